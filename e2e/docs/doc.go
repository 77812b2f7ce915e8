// Package docs reads the commands out of the documentation's pages, so that they can be checked and run.
//
// A page is Markdown. Fenced blocks of kind sh are commands to copy, which must succeed; those of kind console are commands, each
// after "$ ", with what they print. The first line of a block of kind sh may say, for readers as well, that tests do not run it:
//
//	# Not run by our tests: REASON.
//	# Checked but not run by our tests: REASON.
//
// What is checked is at least that the program knows the command and its flags. The tests of this package do that for kind and
// make, and hold kind's configuration and the kustomizations in the pages; package suite has the rest, in a cluster.
package docs

// Package suite runs what the end-to-end tests are made of, and says how it ended.
//
// A suite is a list of [Case]s, which a [Runner] runs one after the other in one cluster. A case that fails, panics or does not
// end takes nothing with it: the next one runs. What a case said, and what it ran, is in a log file of its own. The upstream
// suites are run by their own program, which writes JUnit files; [ReadJUnit] makes the same [Result]s of those, and [Table]
// closes a run.
//
// The suites here: [Walkthrough], each example of manifests/examples with what it allows and what it refuses, and [Docs], the
// documentation's commands.
//
// A try that must be refused has to time out, for that is what a dropped packet looks like from outside. A refusal by the machine
// that it reached, or an error before anything was sent, is no proof and fails the case.
package suite

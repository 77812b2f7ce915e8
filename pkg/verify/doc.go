// Package verify holds what postern enforces against what the NetworkPolicy API's words mean, in clusters and policies made by
// chance. It is test code: `make verify` and `make verify-mutants` run it, and no program of postern's imports it.
//
// Of each packet, four are asked whether it passes:
//
//   - the words: package explain, which reads the API objects and shares nothing with the compiler;
//   - the rules: an interpreter that walks the packet through the compiled chains and sets ([tables]);
//   - the model, by which policyd judges live flows;
//   - the kernel: the same chains and sets, loaded in a network namespace of their own, and real packets sent through ([bench]).
//
// The answers must be one. A world in which they are not is cut down to the few objects that matter ([shrink]) and printed as
// manifests, with this node's records and the packet as comments; put in testdata/regressions, such a file is asked again by
// `make test`. That agreement says something is shown by counting what kinds of packets there were ([census]), and by mutations:
// each spoils one line of the semantics between the objects and the rules, and must be found.
package verify

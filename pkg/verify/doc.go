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
//
// That is a picture that stands still. Random walks ([walk]) are about change: objects and records of a node come, go and change step
// by step, and whatever the path, the end must be what the same objects and records give at once.
//
//   - By patches ([patched]): policy's index and compile's patches, against a fresh model and its state, at every step.
//   - Through the engine ([walker]): an engine in a network namespace of its own, with real records, through restarts, crashes
//     in the middle of a pass, faults of any step, events that come late or in another order, and edits by somebody else; the
//     kernel must in the end be, byte for byte, what a fresh engine makes of a clean one. In the middle of passes the interpreter
//     is asked about the kernel as it is ([leak]): nothing passes that the objects allow neither before nor after the change.
//
// A walk that fails is cut down to the steps that matter and printed with the objects as manifests. Mistakes made on purpose, in
// patches ([spoilers]) and in the kernel ([saboteurs]), show that walks can find them.
package verify

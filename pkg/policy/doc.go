// Package policy turns NetworkPolicies into what they mean for the pods of one node: is a pod isolated in a direction, and what
// may then reach it, or be reached by it.
//
// It is pure: objects in, a [Model] out, the same for the same objects. [Resolve] makes one from nothing; an [Index] is kept up to
// date by what changes ([Index.Update]), and says what follows from it ([Delta]). Package compile makes rules and sets of both, and
// policyd judges live flows by the index ([Index.Allowed]). What a policy means is written in the NetworkPolicy API
// (networking.k8s.io/v1); package explain reads the same words in another way, so that tests can hold the two against each other.
//
// A policy that cannot be used as written closes the pods it selects in its directions, is reported as a [Problem], and
// leaves every other policy working.
package policy

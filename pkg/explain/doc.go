// Package explain answers whether a packet may pass, and why, in the words of the NetworkPolicy API: each policy looked at, the
// rule that admits, or what is missing.
//
// It reads the API objects from the top for each question, in the plainest way there is, and shares nothing with the packages
// that make rules of them (policy, compile). So it is what a person asks, and what tests hold the kernel against.
package explain

// Command nothing does nothing. What its start takes is what any program takes that Go builds.
package main

func main() {}

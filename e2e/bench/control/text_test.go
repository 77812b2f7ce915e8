package control

import "testing"

func TestChainsThatDifferAreWrittenUnderOtherNames(t *testing.T) {
	const before = `*mangle
:FORWARD ACCEPT [1:2]
:POSTERN-TO - [0:0]
:PST-I-aa - [0:0]
:PST-I-bb - [0:0]
-A FORWARD -j POSTERN-TO
-A PST-I-aa -j DROP
-A PST-I-bb -j DROP
COMMIT
`
	const after = `*mangle
:FORWARD ACCEPT [3:4]
:POSTERN-TO - [0:0]
:PST-I-aa - [0:0]
:PST-I-bb - [0:0]
-A FORWARD -j POSTERN-TO
-A PST-I-aa -p tcp -m comment --comment "shop/new: 80" -j RETURN
-A PST-I-aa -j DROP
-A PST-I-bb -j DROP
COMMIT
`
	text, lines := rewrite(saved{after, before}, saved{before, before})
	const want = `*mangle
:BEN-I-aa - [0:0]
-A BEN-I-aa -p tcp -m comment --comment "shop/new: 80" -j RETURN
-A BEN-I-aa -j DROP
COMMIT
`
	if text[0] != want || text[1] != "" || lines != 3 {
		t.Errorf("%d lines:\n%s\n%s", lines, text[0], text[1])
	}
	if gone := without(text); gone[0] != "*mangle\n:BEN-I-aa - [0:0]\n-X BEN-I-aa\nCOMMIT\n" || gone[1] != "" {
		t.Errorf("to remove them:\n%s\n%s", gone[0], gone[1])
	}
	text, _ = rewrite(saved{before, before}, saved{after, before})
	if text[0] != "*mangle\n:BEN-I-aa - [0:0]\n-A BEN-I-aa -j DROP\nCOMMIT\n" {
		t.Errorf("and back:\n%s", text[0])
	}
}

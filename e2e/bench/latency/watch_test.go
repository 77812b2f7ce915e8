package latency

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// tries is a watch of which some tries were answered: those behind the ones that come before the change, one sign each.
func tries(open bool, signs string) *watch {
	w := &watch{request: request{Open: open}}
	add := func(answered bool) {
		w.sent, w.answered = append(w.sent, int64(len(w.sent))*int64(interval)), append(w.answered, answered)
	}
	for range before {
		add(!open)
	}
	for _, sign := range signs {
		add(sign == 'a')
	}
	return w
}

func TestWhichTryShowsAChange(t *testing.T) {
	silence := string(slices.Repeat([]byte("-"), quiet))
	for _, test := range []struct {
		name  string
		open  bool
		signs string
		shown bool
		since int // behind those before the change
	}{
		{"nothing yet", true, "---", false, 3},
		{"the first answer", true, "---a", true, 3},
		{"an answer that came late", true, "---a-", true, 3},
		{"still open", false, "aaa", false, 3},
		{"no answer for a short time", false, "aaa----", false, 3},
		{"no answer for long", false, "aaa" + silence, true, 3},
		{"an answer between", false, "a---a" + silence, true, 5},
		{"at once", false, silence, true, 0},
	} {
		w := tries(test.open, test.signs)
		if got := w.since() - before; w.shown() != test.shown || got != test.since {
			t.Errorf("%s: shown %t, by try %d; want %t and %d", test.name, w.shown(), got, test.shown, test.since)
		}
	}
}

func TestTheResultIsWhenThatTryWasBegunAndTheWorstGapBefore(t *testing.T) {
	w := tries(true, "---a")
	for i := before + 2; i < len(w.sent); i++ {
		w.sent[i] += int64(time.Millisecond)
	}
	if got, want := w.result(), (reply{At: w.sent[before+3], Gap: interval + time.Millisecond}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := tries(true, "---").result(); got.Error == "" {
		t.Errorf("of a change that did not show: %+v", got)
	}
}

func TestAnAnswerTellsWhichTryItIsFor(t *testing.T) {
	from, to := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	request := syn(from, to, 1024, 77)
	if got := checksum(from, to, request); got != 0 {
		t.Errorf("the checksum of a whole segment is %#x, want 0", got)
	}
	packet := make([]byte, 40)
	packet[0] = 4<<4 | 5
	tcp := packet[20:]
	binary.BigEndian.PutUint16(tcp[0:], port)
	binary.BigEndian.PutUint32(tcp[8:], 78)
	for name, test := range map[string]struct {
		flags byte
		want  bool
	}{
		"refused": {flagRST | flagACK, true}, "accepted": {flagSYN | flagACK, true},
		"something else": {flagACK, false}, "no flags": {0, false},
	} {
		tcp[13] = test.flags
		if number, ok := answer(packet); ok != test.want || ok && number != 77 {
			t.Errorf("%s: try %d, %t", name, number, ok)
		}
	}
	tcp[13] = flagRST | flagACK
	for n := range packet {
		if _, ok := answer(packet[:n]); ok {
			t.Errorf("of %d bytes an answer is read", n)
		}
	}
}

package nfnetlink

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// message is one of an answer to request 7.
func message(typ, flags uint16, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, 7)
	return pad(append(append(b, 0, 0, 0, 0), data...))
}

func TestAnAnswerEndsWithWhatItsLastMessageSays(t *testing.T) {
	status := func(n int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }
	some := message(0x600, unix.NLM_F_MULTI, 0, 0, 0, 0, 'a')
	for _, tt := range []struct {
		name              string
		datagram          []byte
		read              string
		done, interrupted bool
		err               error
	}{
		{"more to come", slices.Concat(some, some), "aa", false, false, nil},
		{"the end of a dump", slices.Concat(some, message(unix.NLMSG_DONE, 0, status(0)...), some), "a", true, false, nil},
		{"a bare end", message(unix.NLMSG_DONE, 0), "", true, false, nil},
		{"a dump that failed", message(unix.NLMSG_DONE, 0, status(-int32(unix.ENOMEM))...), "", true, false, unix.ENOMEM},
		{"an acknowledgement", message(unix.NLMSG_ERROR, 0, status(0)...), "", true, false, nil},
		{"a refusal", message(unix.NLMSG_ERROR, 0, status(-4352)...), "", true, false, unix.Errno(4352)},
		{"an interrupted dump", slices.Concat(message(0x600, unix.NLM_F_DUMP_INTR, 0, 0, 0, 0, 'b'), message(unix.NLMSG_DONE, 0)),
			"b", true, true, nil},
		{"no struct nfgenmsg", message(0x600, 0, 1, 2), "", false, false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read := ""
			done, interrupted, err := Split(tt.datagram, 7, func(b []byte) { read += string(b) })
			if read != tt.read || done != tt.done || interrupted != tt.interrupted || !errors.Is(err, tt.err) {
				t.Errorf("%q, done %v, interrupted %v, %v", read, done, interrupted, err)
			}
			if done, _, err := Split(tt.datagram, 8, func([]byte) { t.Error("read an answer to another request") }); done || err != nil {
				t.Errorf("as the answer to another request: done %v, %v", done, err)
			}
		})
	}
	if done, _, err := Split(some[:len(some)-5], 7, nil); !done || err == nil {
		t.Errorf("a message that was cut: done %v, %v; want an error", done, err)
	}
}

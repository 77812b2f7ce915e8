package ipam

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// A range's file: a header of fixed length, then the queue, one line an entry: address, space, nanoseconds of
// CLOCK_BOOTTIME. The header is "offset next": where the queue's first entry begins, and the next address never used ("-":
// there is none).
const (
	headerLen  = 64
	maxLineLen = 64
	// compactAt is how many bytes of passed entries a file may carry before it is written anew.
	compactAt = 64 << 10
)

// queue is an open range file.
type queue struct {
	disk *disk
	file *os.File
	head int64      // offset of the first entry
	tail int64      // offset of the file's end
	next netip.Addr // next address never used; zero: none
}

type entry struct {
	addr     netip.Addr
	released time.Duration // CLOCK_BOOTTIME
	size     int64         // of its line
}

// openQueue opens a range's file and cuts off a torn last line.
func openQueue(d *disk, path string) (*queue, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	q := &queue{disk: d, file: f}
	if err := q.load(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w; delete the file to have the range looked through from its beginning", path, err)
	}
	return q, nil
}

func (q *queue) load() error {
	header := make([]byte, headerLen)
	if _, err := q.file.ReadAt(header, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	fields := strings.Fields(string(header))
	if len(fields) != 2 {
		return fmt.Errorf("header %q: an offset and an address are expected", header)
	}
	info, err := q.file.Stat()
	if err != nil {
		return err
	}
	q.tail = info.Size()
	if q.head, err = strconv.ParseInt(fields[0], 10, 64); err != nil || q.head < headerLen || q.head > q.tail {
		return fmt.Errorf("header %q: the offset is outside the file", header)
	}
	if fields[1] != "-" {
		if q.next, err = netip.ParseAddr(fields[1]); err != nil {
			return fmt.Errorf("header: %w", err)
		}
	}
	return q.cutTornLine()
}

// cutTornLine removes what follows the last newline.
func (q *queue) cutTornLine() error {
	from := max(q.head, q.tail-maxLineLen)
	end := make([]byte, q.tail-from)
	if _, err := q.file.ReadAt(end, from); err != nil {
		return err
	}
	if len(end) == 0 || end[len(end)-1] == '\n' {
		return nil
	}
	q.tail = from + int64(bytes.LastIndexByte(end, '\n')) + 1
	q.disk.step()
	return q.file.Truncate(q.tail)
}

func header(head int64, next netip.Addr) []byte {
	text := "-"
	if next.IsValid() {
		text = next.String()
	}
	return fmt.Appendf(nil, "%-*s\n", headerLen-1, fmt.Sprintf("%d %s", head, text))
}

// first returns the oldest entry; ok is false where the queue is empty.
func (q *queue) first() (e entry, ok bool, err error) { return q.at(q.head) }

func (q *queue) at(offset int64) (entry, bool, error) {
	if offset >= q.tail {
		return entry{}, false, nil
	}
	line := make([]byte, min(maxLineLen, q.tail-offset))
	if _, err := q.file.ReadAt(line, offset); err != nil && err != io.EOF {
		return entry{}, false, err
	}
	e, err := parseEntry(line)
	return e, err == nil, err
}

func parseEntry(b []byte) (entry, error) {
	line, _, ok := bytes.Cut(b, []byte{'\n'})
	addr, released, sep := strings.Cut(string(line), " ")
	if !ok || !sep {
		return entry{}, fmt.Errorf("queue entry %q: an address and a time are expected", line)
	}
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return entry{}, fmt.Errorf("queue entry: %w", err)
	}
	ns, err := strconv.ParseInt(released, 10, 64)
	if err != nil {
		return entry{}, fmt.Errorf("queue entry: %w", err)
	}
	return entry{addr: a, released: time.Duration(ns), size: int64(len(line)) + 1}, nil
}

func appendEntry(b []byte, a netip.Addr, released time.Duration) []byte {
	return fmt.Appendf(b, "%s %d\n", a, released)
}

// entries returns the whole queue. Its cost grows with the queue: it is for messages and a changed configuration.
func (q *queue) entries() ([]entry, error) {
	var all []entry
	for offset := q.head; ; {
		e, ok, err := q.at(offset)
		if !ok {
			return all, err
		}
		all = append(all, e)
		offset += e.size
	}
}

// endsWith reports whether the last entry is about the address.
func (q *queue) endsWith(a netip.Addr) (bool, error) {
	from := max(q.head, q.tail-maxLineLen)
	end := make([]byte, q.tail-from)
	if _, err := q.file.ReadAt(end, from); err != nil || len(end) == 0 {
		return false, err
	}
	e, err := parseEntry(end[bytes.LastIndexByte(end[:len(end)-1], '\n')+1:])
	return err == nil && e.addr == a, nil
}

func (q *queue) push(a netip.Addr, released time.Duration) error {
	line := appendEntry(nil, a, released)
	q.disk.step()
	n, err := q.file.WriteAt(line, q.tail)
	q.tail += int64(n)
	return err
}

// move writes the header: the queue now begins at head, and next is the next address never used.
func (q *queue) move(head int64, next netip.Addr) error {
	q.disk.step()
	if _, err := q.file.WriteAt(header(head, next), 0); err != nil {
		return err
	}
	q.head, q.next = head, next
	return nil
}

// compact writes the file anew without the entries that were passed, once these are many. The file must not be used after.
func (q *queue) compact() error {
	if passed := q.head - headerLen; passed < compactAt || passed < q.tail/2 {
		return nil
	}
	rest := make([]byte, q.tail-q.head)
	if _, err := q.file.ReadAt(rest, q.head); err != nil {
		return err
	}
	return q.disk.write(q.file.Name(), append(header(headerLen, q.next), rest...))
}

func (q *queue) close() { q.file.Close() }

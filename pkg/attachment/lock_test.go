package attachment_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/postern-cni/postern/pkg/attachment"
)

func TestWhoHasWaitedForAnUninstallLocksWhatIsThereThen(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(folder, "policyd.lock")
	uninstall, err := attachment.LockFile(t.Context(), path, true)
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		lock *attachment.Lock
		err  error
	}
	waited := make(chan result, 1)
	go func() {
		lock, err := attachment.LockFile(t.Context(), path, true)
		waited <- result{lock, err}
	}()
	select {
	case r := <-waited:
		t.Fatalf("it did not wait: %v", r.err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	uninstall.Release()
	r := <-waited
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.lock.Release()
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if second, err := attachment.LockFile(short, path, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("two hold the lock: %v", err)
		if second != nil {
			second.Release()
		}
	}
}

package suite

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/postern-cni/postern/e2e/docs"
)

// check says in what a command's output and exit status differ from what the step says.
func check(s docs.Step, output, status string) error {
	if len(s.Prints) == 0 {
		if status != "0" {
			return fmt.Errorf("exit status %s", status)
		}
		return nil
	}
	rest := output
	for _, want := range s.Prints {
		at := strings.Index(rest, want)
		if at < 0 {
			return fmt.Errorf("it does not print %q (or not after what comes before)", want)
		}
		rest = rest[at+len(want):]
	}
	return nil
}

// session is a shell in which kubectl speaks to the cluster. Variables stay from one command to the next.
type session struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	runs  int
}

// newSession starts the shell in a folder.
func (t *T) newSession(ctx context.Context, folder string) *session {
	cmd := exec.CommandContext(ctx, "sh")
	cmd.Env, cmd.Dir = t.Cluster.Environment(), folder
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// What the shell started must end with it, or it would hold the output open.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	s := &session{cmd: cmd}
	var err error
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatalf("start a shell: %v", err)
	}
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	s.out = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatalf("start a shell: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		_ = in.CloseWithError(fmt.Errorf("the shell ended: %w", orEOF(cmd.Wait())))
		close(ended)
	}()
	t.Cleanup(func(context.Context) {
		s.stdin.Close()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Cancel()
		}
	})
	return s
}

// orEOF keeps %w from wrapping nil.
func orEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// run runs one command, which reads nothing, and returns what it printed and its exit status.
func (s *session) run(command string) (output, status string, err error) {
	s.runs++
	mark := fmt.Sprintf("--- end of command %d, status ", s.runs)
	if _, err := fmt.Fprintf(s.stdin, "{ %s\n} </dev/null\nprintf '\\n%s%%s\\n' $?\n", command, mark); err != nil {
		return "", "", err
	}
	var text strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			return text.String(), "", err
		}
		if status, ended := strings.CutPrefix(line, mark); ended {
			return strings.TrimRight(text.String(), "\n"), strings.TrimSpace(status), nil
		}
		text.WriteString(line)
	}
}

// Follow runs steps as a reader would, in one shell that begins in the given folder, and ends the case where one prints something
// else than the page says. A reader takes a moment between two commands; so a step is tried again for a while before it counts as
// failed.
func (t *T) Follow(ctx context.Context, folder string, steps []docs.Step) {
	if len(steps) == 0 {
		t.Fatalf("there is no command to run")
	}
	s := t.newSession(ctx, folder)
	for _, step := range steps {
		t.Eventually(ctx, settleLimit, fmt.Sprintf("%q does what it should", step.Command), func(context.Context) error {
			output, status, err := s.run(step.Command)
			if err != nil {
				t.Fatalf("%s: %v", step.Command, err)
			}
			t.Logf("$ %s\n%s\n(status %s)", step.Command, output, status)
			return check(step, output, status)
		})
	}
}

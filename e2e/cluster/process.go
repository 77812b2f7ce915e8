package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// process is a program that was started and outlives this one. A process id may be given again to another program, which then has
// another start time.
type process struct {
	Name    string
	PID     int
	Started string // in clock ticks after boot, as /proc/PID/stat has it (proc(5), field 22)
}

// spawn starts a program in a session of its own, with its output in the cluster's log folder.
func (c *Cluster) spawn(name string, argv ...string) (process, error) {
	log, err := os.OpenFile(c.path("log", name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return process{}, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return process{}, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { _ = cmd.Wait() }() // collected, should it end before this program does
	p := process{Name: name, PID: cmd.Process.Pid}
	if p.Started, err = startTime(p.PID); err != nil {
		return process{}, fmt.Errorf("start %s: it ended at once: see %s", name, log.Name())
	}
	c.state.Processes = append(c.state.Processes, p)
	return p, c.save()
}

// stop ends a program and waits until it is gone.
func (p process) stop(how syscall.Signal) error {
	if !p.running() {
		return nil
	}
	if err := syscall.Kill(p.PID, how); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end %s (process %d): %w", p.Name, p.PID, err)
	}
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !p.running() {
			return nil
		}
	}
	return fmt.Errorf("end %s (process %d): still running 20 s after signal %v", p.Name, p.PID, how)
}

func (p process) running() bool {
	started, err := startTime(p.PID)
	return err == nil && started == p.Started
}

// startTime of a process that has not ended; a zombie has.
func startTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // the name before may hold anything
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", errors.New("the process has ended")
	}
	return fields[19], nil
}

// state is what must outlive this program for another one to take the cluster over, or down.
type state struct {
	Config    Config
	Processes []process
	Cgroups   []string
	Installed bool
	Before    map[string]string // by node, its files before the first Install
}

func (c *Cluster) save() error {
	data, err := json.MarshalIndent(c.state, "", "  ")
	if err != nil {
		return err
	}
	file := c.path("run", "state.json")
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		return fmt.Errorf("keep the cluster's state: %w", err)
	}
	return os.Rename(file+".new", file)
}

// path is a file in the cluster's folder.
func (c *Cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir}, parts...)...)
}

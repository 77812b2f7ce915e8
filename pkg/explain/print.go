package explain

import (
	"fmt"
	"strings"
)

// All joins answers: allowed if each is, and the text of all.
func All(answers []Answer) (allowed bool, text string) {
	allowed = true
	for _, a := range answers {
		allowed = allowed && a.Allowed
		text += a.String()
	}
	return allowed, text
}

// port names the query's port: "5432/TCP".
func (q Query) port() string {
	if q.Protocol == "" {
		return "none"
	}
	return fmt.Sprintf("%d/%s", q.Port, q.Protocol)
}

// String tells the answer in lines: the verdict, then what each policy that was looked at says.
func (a Answer) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s -> %s, port %s\n", verdict(a.Allowed), a.Query.From, a.Query.To, a.Query.port())
	if a.Always != "" {
		fmt.Fprintf(&b, "  %s\n", a.Always)
	}
	for _, s := range a.Sides {
		fmt.Fprintf(&b, "  %s of %s: %s: ", strings.ToLower(string(s.Direction)), s.Pod, verdict(s.Allowed))
		switch n := len(s.Policies); {
		case n == 0:
			b.WriteString("no policy isolates it\n")
		case s.Allowed:
			b.WriteString("a policy admits this\n")
		case n == 1:
			b.WriteString("one policy isolates it, and does not admit this\n")
		default:
			fmt.Fprintf(&b, "%d policies isolate it, and none admits this\n", n)
		}
		for _, l := range s.Policies {
			for _, reason := range l.Reasons {
				fmt.Fprintf(&b, "    %s: %s\n", l.Policy, reason)
			}
		}
	}
	return b.String()
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

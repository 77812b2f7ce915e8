// Command libcni112 attaches a network namespace through libcni v1.1.2, the last release before version 1.1.0 of the CNI
// specification, as containerd 1.6 and 1.7 do. A module of its own, for a build holds one version of a library.
//
//	CNI_PATH=bin libcni112 add|check|del CONFLIST CONTAINER-ID NETNS IFNAME
//
// CNI_PATH lists the folders of the plugins, K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID, where set, are passed on in
// CNI_ARGS, and PORT_MAPPINGS, a JSON array, as the capability of that name. add prints the result. Results are kept for
// check and del in CNI_CACHE_DIR (default: libcni's own).
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "libcni112:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) != 5 {
		return fmt.Errorf("%d arguments: want add|check|del CONFLIST CONTAINER-ID NETNS IFNAME", len(args))
	}
	list, err := libcni.ConfListFromFile(args[1])
	if err != nil {
		return fmt.Errorf("read %s: %w", args[1], err)
	}
	runtime := &libcni.RuntimeConf{ContainerID: args[2], NetNS: args[3], IfName: args[4]}
	for _, key := range []string{"K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID"} {
		if value, set := os.LookupEnv(key); set {
			runtime.Args = append(runtime.Args, [2]string{key, value})
		}
	}
	if text := os.Getenv("PORT_MAPPINGS"); text != "" {
		var mappings any
		if err := json.Unmarshal([]byte(text), &mappings); err != nil {
			return fmt.Errorf("read PORT_MAPPINGS: %w", err)
		}
		runtime.CapabilityArgs = map[string]any{"portMappings": mappings}
	}
	cni := libcni.NewCNIConfigWithCacheDir(filepath.SplitList(os.Getenv("CNI_PATH")), os.Getenv("CNI_CACHE_DIR"), nil)
	switch args[0] {
	case "add":
		result, err := cni.AddNetworkList(ctx, list, runtime)
		if err != nil {
			return err
		}
		return result.PrintTo(stdout)
	case "check":
		return cni.CheckNetworkList(ctx, list, runtime)
	case "del":
		return cni.DelNetworkList(ctx, list, runtime)
	}
	return fmt.Errorf("command %q: want add, check or del", args[0])
}

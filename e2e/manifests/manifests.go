// Package manifests renders what is in the folder manifests, as `kubectl kustomize` does.
package manifests

import (
	"fmt"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// head is for those who open the rendered file first.
const head = "# Rendered from %s by `make manifests`: change it there.\n"

// Render returns the text of a kustomization, a folder such as "overlays/kind" in the folder manifests.
func Render(manifests, folder string) ([]byte, error) {
	objects, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), manifests+"/"+folder)
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", folder, err)
	}
	text, err := objects.AsYaml()
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", folder, err)
	}
	return append(fmt.Appendf(nil, head, "manifests/"+folder), text...), nil
}

module github.com/postern-cni/postern/e2e/libcni112

go 1.26.0

require github.com/containernetworking/cni v1.1.2

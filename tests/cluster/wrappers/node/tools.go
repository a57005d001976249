//go:build tools

// Package tools names the programs of a node. They are apart from those of the control plane, which every lane needs:
// what a node's pins change does not build an API server again.
package tools

import (
	_ "k8s.io/kubernetes/cmd/kube-proxy"
	_ "k8s.io/kubernetes/cmd/kubelet"
)

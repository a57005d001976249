//go:build tools

// Package tools names the programs that the control plane tests build, so that go mod tidy keeps what they need.
package tools

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
)

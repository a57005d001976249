//go:build tools

// Package tools names the programs that the tests build, so that go mod tidy keeps what they need.
package tools

import (
	_ "sigs.k8s.io/kube-network-policies/cmd"
)

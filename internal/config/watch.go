// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"time"
)

// lookEvery is the time between two looks at the file.
const lookEvery = time.Second

// Watch returns a channel that is closed once the file's content is another
// than when Watch was called, and remains so for a second: a file half written
// is not taken for a change, nor one that is gone, nor one written anew with
// what it held. Nothing happens any more when ctx is done.
//
// Call it before Load: then no change is missed.
//
// The file is read, not watched by the kernel: that tells nothing about a file
// behind another symbolic link or mount, and nodes often run out of inotify
// instances. kubelet swaps the link ..data of a ConfigMap's volume, which is
// one more change of content.
//
// What is no regular file, such as a pipe, is left for Load to read and never
// changes. The error says that the file cannot be read to begin with.
func Watch(ctx context.Context, path string) (<-chan struct{}, error) {
	changed := make(chan struct{})
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		return changed, nil
	}
	var now [sha256.Size]byte
	if err == nil {
		now, err = digest(path)
	}
	if err != nil {
		return nil, fmt.Errorf("watch kube-proxy configuration: %w", err)
	}
	go func() {
		if awaitChange(ctx, path, now) {
			close(changed)
		}
	}()
	return changed, nil
}

// awaitChange returns true when two looks in a row have found the same new
// content, and false when ctx is done.
func awaitChange(ctx context.Context, path string, first [sha256.Size]byte) bool {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	last := first
	for {
		select {
		case <-ctx.Done():
			return false
		case <-look.C:
		}
		now, err := digest(path)
		if err != nil {
			now = first
		}
		if now != first && now == last {
			return true
		}
		last = now
	}
}

// digest returns the hash of the file's content.
func digest(path string) ([sha256.Size]byte, error) {
	data, err := os.ReadFile(path)
	return sha256.Sum256(data), err
}

// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package controlplane

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// CA returns the authority, in PEM, that signs the API server's certificate.
func (c *ControlPlane) CA() []byte { return c.serving.pem }

// ReplaceCA gives the API server, which must have been stopped, a certificate of
// another authority.
func (c *ControlPlane) ReplaceCA() error {
	var err error
	if c.serving, err = newAuthority(); err != nil {
		return err
	}
	c.config.CAData = c.serving.pem
	return c.reissue()
}

// reissue makes a new certificate for the API server.
func (c *ControlPlane) reissue() error {
	pair, err := c.serving.server(
		[]string{"localhost", "kubernetes.default.svc"},
		[]net.IP{c.options.Address.AsSlice(), net.IPv4(10, 96, 0, 1), net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	return pair.write(c.dir, "apiserver")
}

// Backup is a copy of all that etcd held.
type Backup string

// SaveData makes a backup of what etcd holds. It is away for a moment.
func (c *ControlPlane) SaveData() (Backup, error) {
	if err := c.etcd.stop(syscall.SIGTERM); err != nil {
		return "", err
	}
	saved, err := os.MkdirTemp(c.dir, "backup-")
	if err == nil {
		err = os.CopyFS(saved, os.DirFS(c.path("etcd")))
	}
	if err = errors.Join(err, c.startEtcd()); err != nil {
		return "", fmt.Errorf("back up etcd: %w", err)
	}
	return Backup(saved), nil
}

// RestoreData puts a backup in the place of what etcd holds, and nothing if it is
// empty. The API server must have been stopped.
func (c *ControlPlane) RestoreData(b Backup) error {
	if err := c.etcd.stop(syscall.SIGKILL); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(c.path("etcd"), "*"))
	for _, path := range old {
		err = errors.Join(err, os.RemoveAll(path))
	}
	if b != "" {
		err = errors.Join(err, os.CopyFS(c.path("etcd"), os.DirFS(string(b))))
	}
	if err = errors.Join(err, c.startEtcd()); err != nil {
		return fmt.Errorf("restore etcd: %w", err)
	}
	return nil
}

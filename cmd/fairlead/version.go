// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// version is set by the linker: -ldflags "-X main.version=v1.2.3".
var version = "dev"

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long: `Prints the version, the version of the layout that maps are pinned with, and
what it was built with.`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "fairlead %s (datapath v%d, %s, %s/%s)\n",
				buildVersion(), datapath.ABI, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// buildVersion returns the version that the linker was given or else what the
// build knows of the commit: "dev-0123456789ab", with "-dirty" when files had
// been changed.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if version != "dev" || !ok {
		return version
	}
	return devVersion(info.Settings)
}

func devVersion(settings []debug.BuildSetting) string {
	v := version
	dirty := ""
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision" && s.Value != "":
			v += "-" + s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	return v + dirty
}

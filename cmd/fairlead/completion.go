// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"github.com/spf13/cobra"
)

func newCompletionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print a script that makes a shell complete fairlead's command lines",
		Long: `Prints a script for bash, zsh, fish or powershell. To use it at once:

  bash        source <(fairlead completion bash)
  zsh         source <(fairlead completion zsh)
  fish        fairlead completion fish | source
  powershell  fairlead completion powershell | Out-String | Invoke-Expression

To have it in every new shell, as root:

  bash  fairlead completion bash > /etc/bash_completion.d/fairlead
  zsh   fairlead completion zsh > /usr/local/share/zsh/site-functions/_fairlead
  fish  fairlead completion fish > /etc/fish/completions/fairlead.fish

bash needs the package bash-completion.`,
		Args:              oneOf("shell", shells),
		ValidArgsFunction: completeFirst(shells...),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			default:
				return root.GenPowerShellCompletionWithDesc(out)
			}
		},
	}
}

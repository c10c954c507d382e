// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -type addr -type frontend_kind -type side -type empty_range -type service_option -type member_use -type node_address -type flow_flag -type flow_state -type device_flag -type flow -type flow_key -type device -type verdict -type counter -type overflow_side -type udp_reason -type origin -type origin_record -type udp_record bpf ../../bpf/datapath.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu

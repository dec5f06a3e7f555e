#!/bin/sh
# Two machines with the model at one path: two_nodes.sh RANK MASTER_ADDRESS MODEL [NAME=DIRECTORY ...]; RANK 0 is the master,
# which answers requests, and rank 1 is started with the same arguments. Each takes half of every matrix.
set -e
rank=$1 master=$2
shift 2
headless=
[ "$rank" = 0 ] || headless=--headless
exec env TP=2 OPTIONS="$OPTIONS --nnodes 2 --node-rank $rank --master-addr $master $headless" "$(dirname "$0")/serve.sh" "$@"

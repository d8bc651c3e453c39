#!/bin/sh
# Generates the Go code of starmesh's protos into starmesh/v1; it is not committed.
set -eu
cd "$(dirname "$0")"
package=starmesh.example/client/starmesh/v1
protos="starmesh/v1/inference.proto starmesh/v1/sequence.proto"
options="module=starmesh.example/client"
for proto in $protos; do options="$options,M$proto=$package"; done
exec protoc -I ../../protos --go_out=. --go_opt="$options" --go-grpc_out=. --go-grpc_opt="$options" $protos

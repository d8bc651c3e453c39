#!/bin/sh
# Builds the program into FILE with Debian's Go packages, which are laid out as a GOPATH, and no network.
set -eu
cd "$(dirname "$0")"
./generate.sh
path=$(mktemp -d)
trap 'rm -rf "$path"' EXIT
mkdir -p "$path/src/starmesh.example"
ln -s "$PWD" "$path/src/starmesh.example/client"
CGO_ENABLED=0 GO111MODULE=off GOPATH="$path:/usr/share/gocode" go build -o "$1" starmesh.example/client

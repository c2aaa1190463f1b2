# Sourced by tools/demo and tools/test: Debian packages and the Rust toolchain.
# Installs only what is missing, so a second run spends no time here.

rust_needed=1.89

as_root() {
    if [[ $(id -u) -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "this needs root: $*" >&2
        return 1
    fi
}

need_packages() {
    local package missing=()
    for package in "$@"; do
        if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
            missing+=("$package")
        fi
    done
    if [[ ${#missing[@]} -eq 0 ]]; then
        return
    fi
    echo "installing ${missing[*]}" >&2
    as_root apt-get update -qq >&2
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

need_rust() {
    if ! command -v cargo >/dev/null && [[ -x $HOME/.cargo/bin/cargo ]]; then
        PATH=$HOME/.cargo/bin:$PATH
    fi
    if ! command -v cargo >/dev/null; then
        echo "cargo is missing: install Rust $rust_needed or later with rustup (https://rustup.rs);" >&2
        echo "the Rust of Debian 12 (1.63) is too old" >&2
        return 1
    fi
    local version
    version=$(cargo --version | cut -d ' ' -f 2)
    if ! printf '%s\n' "$rust_needed" "$version" | sort -C -V; then
        echo "cargo $version is too old: Rust $rust_needed or later is needed (rustup update)" >&2
        return 1
    fi
}

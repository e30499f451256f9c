#!/bin/sh
# Installs hetero_async on this host as a systemd service; again for an upgrade. See README.md beside this file.
set -eu
umask 022 # the service reads what is installed here

usage() {
    cat <<'END'
usage: install.sh server  RUN [options] [-- --samples N --address tcp://HOST:PORT …]
                                                      the parameter server of a run; behind --: what `init` is told
       install.sh standby RUN --name NAME [options]   a standby of it: a [standbys.NAME] of the server's run.toml
       install.sh site    RUN --site SITE --train 'python train.py' [options]
       install.sh witness --member NAME --members NAME=IP,NAME=IP,NAME=IP   one member of an etcd cluster
       install.sh uninstall [options]                 all but /var/lib/hetero-async, where the runs lie

  --join 'ADDRESS#KEY' standby, site: get into the run, as `init` printed it; waits until the server's host allows it
  --workers N          site, with --join: how many processes train here (default: 1)
  --package SPEC       what pip installs: a directory, a wheel, hetero-async==1.0 (default: this checkout)
  --python PROGRAM     which Python the software gets (default: python3)
  --environment DIR    use this Python environment, which has hetero-async already, and make none
  --root DIR           put everything under DIR, start nothing and make no user: for images, and to look at it
  --dry-run            say what would be done, and do nothing
END
}

fail() {
    echo "error: $1" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
role=${1:-}
case $role in
    witness | uninstall) run='' && shift ;;
    server | standby | site)
        run=${2:-}
        case $run in '' | -*) usage >&2; fail "say which run" ;; esac
        shift 2
        ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2; fail "'$role' is not server, standby, site, witness or uninstall" ;;
esac

name=server site='' train='' join='' workers=1 member='' members='' dry_run=no
package=$(dirname "$here") python=python3 environment='' root=''
while [ $# -gt 0 ]; do
    case $1 in
        --) shift && break ;;
        --dry-run) dry_run=yes && shift && continue ;;
        --name | --site | --train | --join | --workers | --member | --members | --python | --package | --environment | --root)
            case ${2:-} in '' | --*) fail "$1 needs a value" ;; esac
            ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --site) site=$2 ;;
        --train) train=$2 ;;
        --join) join=$2 ;;
        --workers) workers=$2 ;;
        --member) member=$2 ;;
        --members) members=$2 ;;
        --python) python=$2 ;;
        --package) package=$2 ;;
        --environment) environment=$2 ;;
        --root) root=$2 ;;
    esac
    shift 2
done
case $run in *[!a-z0-9-]*) fail "RUN is '$run': it may have a-z, 0-9 and - in it" ;; esac
[ "$role" != standby ] || [ "$name" != server ] || fail "a standby needs --name: a [standbys.NAME] of run.toml"
[ "$role" != site ] || [ -n "$site" ] || fail "a site needs --site SITE, as in run.toml"
[ "$role" != site ] || [ -n "$train" ] || fail "a site needs --train 'python train.py'"
[ $# -eq 0 ] || [ "$role" = server ] || fail "only for a server do words for init come behind --: $*"
[ -z "$join" ] || [ "$role" != server ] || fail "a server joins nobody; give --join to the others"
[ "$role" != witness ] || case ",$members," in
    *",$member="?*) [ -n "$member" ] || fail "a witness needs --member NAME, one of --members" ;;
    *) fail "a witness needs --member NAME and --members NAME=IP,…, with that NAME among them" ;;
esac
[ -z "$environment" ] || [ -x "$environment/bin/hetero-async" ] || [ "$dry_run" = yes ] ||
    fail "$environment has no bin/hetero-async: pip install hetero-async into it first"
[ "$dry_run" = yes ] || [ -n "$root" ] || [ "$(id -u)" -eq 0 ] || fail "this changes /opt, /etc and systemd: run it as root"

opt=$root/opt/hetero-async etc=$root/etc/hetero-async units=$root/etc/systemd/system state=$root/var/lib/hetero-async
local=$root/usr/local/bin user=hetero-async
[ -z "$root" ] || user=$(id -un)

# Everything that changes something goes through here.
try() {
    echo "+ $*"
    [ "$dry_run" = yes ] || "$@"
}

# Only on a host that is running: not into an image.
on_host() {
    [ -n "$root" ] || try "$@"
}

# What is made in the run's directory belongs to the service's user.
hetero_async() {
    if [ -n "$root" ]; then
        try "$opt/current/bin/hetero-async" "$@"
    else
        try runuser -u "$user" -- env -C / "$opt/current/bin/hetero-async" "$@"
    fi
}

write_file() { # PATH, content from standard input; what is there stays
    content=$(cat)
    if [ -e "$1" ]; then
        echo "  kept $1"
    else
        echo "+ write $1"
        [ "$dry_run" = yes ] || printf '%s\n' "$content" >"$1"
    fi
}

release_id() {
    if [ -n "$environment" ]; then
        printf 'environment-%s' "$(printf %s "$environment" | sha256sum | cut -c1-12)"
    elif [ -d "$package" ]; then
        (cd "$package" && find pyproject.toml hetero_async deploy -type f ! -name '*.pyc' -print | LC_ALL=C sort |
            xargs sha256sum | sha256sum | cut -c1-12)
    elif [ -f "$package" ]; then
        sha256sum "$package" | cut -c1-12
    else
        printf %s "$package" | sha256sum | cut -c1-12
    fi
}

make_release() {
    release=$opt/releases/$(release_id)
    if [ -e "$release/complete" ]; then
        echo "  kept $release"
    else
        try rm -rf "$release"
        try mkdir -p "$release/bin" "$release/libexec" "$release/share/deploy"
        if [ -n "$environment" ]; then
            try ln -s "$environment/bin/hetero-async" "$release/bin/hetero-async"
        else
            # A unit sees no home, and its user may not enter root's.
            [ -n "$root" ] || case $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
                /root/* | /home/*) fail "$python lies in a home directory, which services do not see; say --python /usr/bin/python3" ;;
            esac
            try "$python" -m venv "$release/venv"
            try "$release/venv/bin/pip" install --quiet --disable-pip-version-check "$package"
            try ln -s ../venv/bin/hetero-async "$release/bin/hetero-async"
        fi
        try install -m 755 "$here/node" "$here/in-run" "$release/libexec"
        try install -m 644 "$here/README.md" "$release/share/deploy/README.md"
        try touch "$release/complete"
    fi
    # One rename: a service that starts meanwhile finds the old release or the new one.
    try ln -sfn "releases/$(basename "$release")" "$opt/current.new"
    try mv -T "$opt/current.new" "$opt/current"
}

install_role() { # [what init is told …]
    on_host_user
    try mkdir -p "$opt/releases" "$etc" "$units" "$local"
    try install -d -m 750 -o "$user" "$state"
    make_release
    try ln -sfn "$opt/current/libexec/in-run" "$local/hetero-async-in"
    unit=hetero-async-server
    if [ "$role" = site ]; then
        unit=hetero-async-site
        printf 'SITE=%s\nTRAIN=%s\n' "$site" "$train" | write_file "$etc/$run.site.env"
    else
        printf 'ROLE=%s\nNAME=%s\n' "$role" "$name" | write_file "$etc/$run.server.env"
    fi
    try install -m 644 "$here/systemd/$unit@.service" "$units/$unit@.service"
    on_host systemctl daemon-reload
    on_host systemctl enable "$unit@$run.service"
    enter_run "$@"
    if [ "$dry_run" = no ] && [ ! -e "$state/$run/run.toml" ]; then
        echo "next: make the run in $state/$run (hetero-async init, join-standby or join-site), then: systemctl start $unit@$run"
    elif [ -n "$root" ]; then
        echo "next, on the host that has $root as its /: systemctl start $unit@$run"
    else
        # The run lies in the state directory; workers wait for a server that is away, and offer again what is unanswered.
        on_host systemctl restart "$unit@$run.service"
        echo "see it with: journalctl -u $unit@$run"
    fi
}

# Once: what is there stays, whatever is said the second time.
enter_run() { # [what init is told …]
    if [ -e "$state/$run/run.toml" ]; then
        echo "  kept $state/$run/run.toml"
    elif [ "$role" = server ] && [ $# -gt 0 ]; then
        hetero_async init "$state/$run" --name "$run" "$@"
        echo "the others are installed with: --join and what stands in quotes above"
    elif [ "$role" = standby ] && [ -n "$join" ]; then
        hetero_async join-standby "$join" --name "$name" "$state/$run"
    elif [ "$role" = site ] && [ -n "$join" ]; then
        hetero_async join-site "$join" --site "$site" --workers "$workers" "$state/$run"
    fi
}

install_witness() {
    command -v etcd >/dev/null || [ "$dry_run" = yes ] || fail "there is no etcd; on Debian and Ubuntu: apt-get install etcd-server"
    case ",$members" in *",$member="*) own=${members#*"$member="} && own=${own%%,*} ;; esac
    try mkdir -p "$etc" "$units"
    {
        printf 'ETCD_NAME=%s\n' "$member"
        printf 'ETCD_LISTEN_CLIENT_URLS=http://%s:2379\n' "$own"
        printf 'ETCD_ADVERTISE_CLIENT_URLS=http://%s:2379\n' "$own"
        printf 'ETCD_LISTEN_PEER_URLS=http://%s:2380\n' "$own"
        printf 'ETCD_INITIAL_ADVERTISE_PEER_URLS=http://%s:2380\n' "$own"
        printf 'ETCD_INITIAL_CLUSTER=%s:2380\n' "$(echo "$members" | sed 's|=|=http://|g; s|,|:2380,|g')"
    } | write_file "$etc/witness.env"
    try install -m 644 "$here/systemd/hetero-async-witness.service" "$units/hetero-async-witness.service"
    on_host systemctl daemon-reload
    on_host systemctl enable hetero-async-witness.service
    on_host systemctl restart hetero-async-witness.service
}

on_host_user() {
    [ -n "$root" ] || id hetero-async >/dev/null 2>&1 ||
        try useradd --system --home-dir /var/lib/hetero-async --shell /usr/sbin/nologin hetero-async
}

uninstall() {
    for file in "$etc"/*.server.env "$etc"/*.site.env; do
        [ -e "$file" ] || continue
        instance=$(basename "$file" .env) # RUN.server or RUN.site
        on_host systemctl disable --now "hetero-async-${instance##*.}@${instance%.*}.service"
    done
    [ ! -e "$etc/witness.env" ] || on_host systemctl disable --now hetero-async-witness.service
    try rm -f "$units/hetero-async-server@.service" "$units/hetero-async-site@.service" \
        "$units/hetero-async-witness.service" "$local/hetero-async-in"
    on_host systemctl daemon-reload
    try rm -rf "$opt" "$etc"
    echo "the runs are still in $state (a witness's word in $state-witness); remove it yourself if nobody needs them"
}

case $role in
    uninstall) uninstall ;;
    witness) install_witness ;;
    *) install_role "$@" ;;
esac

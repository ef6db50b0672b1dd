#!/bin/sh
# Entry point of the worker container: permits login with one public key, then becomes sshd.
#
#   SSH_PUBLIC_KEY  required; the key that may log in, as a line of authorized_keys
#   SSH_USER        the account to log in to, which must exist (default: the user that the container runs as)
#   SSH_PORT        the port sshd listens on (default: 22)
#   FARGATE_DEADLINE
#                   when the container ends by itself, in seconds since 1970 (default: never)
#
# The container may run as any user in /etc/passwd, and with a read-only root file system: all files are written to
# /run/sshd or, if that is not possible, to a new directory in /tmp.
#
# POSIX sh, so that it serves in images without bash too. Needs getent, sed, ssh-keygen and sshd.
set -eu

say() {
  echo "worker-entrypoint: $*" >&2
}

fail() {
  say "$*"
  exit 64 # EX_USAGE of sysexits.h
}

deadline=
case ${FARGATE_DEADLINE:-} in
  '') ;;
  *[!0-9]* | ????????????????*)
    say "FARGATE_DEADLINE is '$FARGATE_DEADLINE', not a whole number of at most 15 digits: it is ignored" ;;
  *)
    deadline=${FARGATE_DEADLINE#"${FARGATE_DEADLINE%%[!0]*}"} # without leading zeros, which would make it octal
    deadline=${deadline:-0}
    if [ "$deadline" -le "$(date +%s)" ]; then
      say "the deadline $deadline has passed: nothing is started"
      exit 124 # as timeout(1)
    fi ;;
esac
unset FARGATE_DEADLINE

own=$(id -u)
self=$(getent passwd "$own") ||
  fail "the container runs as user $own, but this image has no such user: add one (useradd --uid $own NAME)"
user=${SSH_USER:-${self%%:*}}
[ -n "${SSH_PUBLIC_KEY:-}" ] ||
  fail "SSH_PUBLIC_KEY is not set: give the container the public key that may log in"
account=$(getent passwd "$user") ||
  fail "SSH_USER is '$user', but this image has no such user"
IFS=: read -r user _ uid gid _ <<END
$account
END
port=${SSH_PORT:-22}
if [ "$own" -ne 0 ]; then
  [ "$uid" -eq "$own" ] ||
    fail "SSH_USER is '$user', but the container runs as ${self%%:*}, who cannot start a session for anybody else"
  lowest=$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start 2>/dev/null) || lowest=1024
  [ "$port" -ge "$lowest" ] ||
    fail "$user may not listen on port $port: set SSH_PORT (and Port of the driver) to $lowest or higher"
fi

# A directory for the files that sshd reads. As root, sshd also confines its unprivileged process to /run/sshd.
state=/run/sshd
strict=yes
if ! (umask 077 && mkdir -p "$state" && true >"$state/config") 2>/dev/null; then
  [ "$own" -ne 0 ] || [ -d "$state" ] || fail "$state does not exist and cannot be made: make it in the image"
  state=$(mktemp -d /tmp/sshd.XXXXXX 2>/dev/null) ||
    fail "neither /run/sshd nor /tmp can be written to: mount a writable volume there"
  strict=no # StrictModes refuses any path below /tmp, which is world-writable. This directory is not.
fi
chmod 755 "$state"

# The key, with the owner that sshd requires. No process below inherits the variable.
printf '%s\n' "$SSH_PUBLIC_KEY" >"$state/authorized_keys"
chmod 600 "$state/authorized_keys"
[ "$uid" -eq "$own" ] || chown "$uid:$gid" "$state/authorized_keys"
unset SSH_PUBLIC_KEY

# If root runs sshd, it refuses even key logins to an account whose password starts with "!", as useradd leaves it.
# "*" does not allow a password login either, but sshd accepts it.
if [ "$own" -eq 0 ] && grep -q "^$user:!" /etc/shadow; then
  sed -i "s/^$user:![^:]*:/$user:*:/" /etc/shadow 2>/dev/null ||
    fail "the account $user is locked, and /etc/shadow cannot be written: unlock it in the image (usermod -p '*' $user)"
fi

# Host keys of this container alone, in a directory that no image layer fills. ed25519 is what clients
# prefer, ecdsa is for those held to FIPS. No rsa: making it can take seconds on a quarter of a vCPU.
for type in ed25519 ecdsa; do
  rm -f "$state/host_$type" "$state/host_$type.pub"
  ssh-keygen -q -t "$type" -N '' -C '' -f "$state/host_$type"
done

# sshd starts sessions with a new environment. They get the container's variables too: those of the image's ENV, of the
# task definition's `environment` and `secrets`, and of ECS, except those that a login sets itself or that change how a
# shell works. One line each, as NAME=value; meanwhile, \036 stands for a line break in a value.
environment=$(tr '\0\n' '\n\036' <"/proc/$$/environ" | LC_ALL=C sed -E \
  -e '/^[A-Za-z_][A-Za-z0-9_]*=/!d' \
  -e '/^(SSH_.*|FARGATE_.*|HOME|USER|LOGNAME|SHELL|MAIL|PWD|OLDPWD|SHLVL|_)=/d' \
  -e '/^(UID|EUID|PPID|SHELLOPTS|BASHOPTS|BASH_ENV|BASH_XTRACEFD|ENV|IFS|PS4|POSIXLY_CORRECT)=/d')
# sshd_config has no way to write a line break.
broken=$(printf '%s\n' "$environment" | LC_ALL=C sed -n "s/=.*$(printf '\036').*//p" | tr '\n' ' ')
[ -z "$broken" ] || say "not passed to sessions, because they hold line breaks: $broken"
# Quoted for sshd_config, where only \ and " are special inside quotes.
set_env=$(printf '%s\n' "$environment" | LC_ALL=C sed -e "/$(printf '\036')/d" -e '/^$/d' -e 's/[\\"]/\\&/g' -e 's/.*/"&"/' |
  tr '\n' ' ')

# The whole configuration, so that nothing depends on the image's /etc/ssh/sshd_config.
(
  umask 077
  cat >"$state/config" <<END
Port $port
HostKey $state/host_ed25519
HostKey $state/host_ecdsa
PidFile none
UseDNS no
PrintMotd no

AllowUsers $user
PermitRootLogin prohibit-password
AuthenticationMethods publickey
AuthorizedKeysFile $state/authorized_keys
StrictModes $strict
PasswordAuthentication no
KbdInteractiveAuthentication no
# Without PAM: its loginuid module ends every session where the container may not set a login uid.
UsePAM no

DisableForwarding yes
X11Forwarding no
# Only the first SetEnv line counts, so all pairs stand on one. There is no AcceptEnv. FARGATE_ENVIRONMENT tells the
# driver that it need not look for the container's environment itself.
SetEnv FARGATE_ENVIRONMENT=passed $set_env
END
)

# Ends the container at the deadline, so that a forgotten task does not run, and cost, for ever. No defence against a
# hostile job, which is root. Looks at the clock every minute, because it may be set in between. Repeats TERM, because
# process 1 ignores it until sshd is ready. Ignores signals itself, so that a job's `kill -TERM -1` does not end it.
watch() {
  trap '' HUP INT TERM
  while left=$((deadline - $(date +%s))) && [ "$left" -gt 0 ]; do
    [ "$left" -lt 60 ] || left=60
    sleep "$left" || :
  done
  say "the deadline $deadline has passed: ending the container"
  # $$ is the entry point, which is sshd by now.
  while kill -TERM $$ 2>/dev/null; do
    sleep 10 || :
  done
}
[ -z "$deadline" ] || watch &

# As process 1: TERM ends sshd at once, and then the kernel ends the container and every session.
exec /usr/sbin/sshd -D -e -f "$state/config"

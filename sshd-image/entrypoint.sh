#!/bin/sh
# Entry point of the worker container: permits login with one public key, then becomes sshd.
#
#   SSH_PUBLIC_KEY  required; the key that may log in, as a line of authorized_keys
#   SSH_USER        the account to log in to, which must exist (default: the user that the container runs as)
#   SSH_PORT        the port sshd listens on (default: 22)
#   FARGATE_DEADLINE
#                   when the container stops itself, in seconds since 1970 (default: never)
#
# The container may run as any user in /etc/passwd, and with a read-only root file system: all files are written to
# /run/sshd or, if that is not possible, to a new directory in /tmp.
#
# POSIX sh, for dash and busybox, so that it also works in images without bash. Needs getent, grep, sed, tr, ssh-keygen
# and sshd.
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
    say "ignoring FARGATE_DEADLINE: '$FARGATE_DEADLINE' is not a whole number of at most 15 digits" ;;
  *)
    deadline=${FARGATE_DEADLINE#"${FARGATE_DEADLINE%%[!0]*}"} # strip leading zeros, which would make it octal
    deadline=${deadline:-0}
    if [ "$deadline" -le "$(date +%s)" ]; then
      say "the deadline $deadline has passed: not starting"
      exit 124 # as timeout(1)
    fi ;;
esac
unset FARGATE_DEADLINE

own=$(id -u)
self=$(getent passwd "$own") ||
  fail "the container runs as user $own, but this image has no such user: add one (useradd --uid $own NAME)"
[ -n "${SSH_PUBLIC_KEY:-}" ] ||
  fail "SSH_PUBLIC_KEY is not set: give the container the public key that may log in"
account=$self
if [ -n "${SSH_USER:-}" ]; then
  account=$(getent passwd "$SSH_USER") ||
    fail "SSH_USER is '$SSH_USER', but this image has no such user"
fi
IFS=: read -r user _ uid gid _ <<END
$account
END
port=${SSH_PORT:-22}
if [ "$own" -ne 0 ]; then
  [ "$uid" -eq "$own" ] ||
    fail "SSH_USER is '$SSH_USER', but the container runs as ${self%%:*}, who cannot start a session for another user"
  min_port=$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start 2>/dev/null) || min_port=1024
  [ "$port" -ge "$min_port" ] ||
    fail "$user may not listen on port $port: set SSH_PORT (and Port of the driver) to $min_port or higher"
fi

# The directory for the files that sshd reads. As root, sshd also confines its unprivileged process to /run/sshd.
state=/run/sshd
strict=yes
if ! (umask 077 && { [ -d "$state" ] || mkdir -p "$state"; } && true >"$state/config") 2>/dev/null; then
  [ "$own" -ne 0 ] || [ -d "$state" ] || fail "$state does not exist and cannot be created: create it in the image"
  state=$(mktemp -d /tmp/sshd.XXXXXX 2>/dev/null) ||
    fail "neither /run/sshd nor /tmp can be written to: mount a writable volume there"
  strict=no # StrictModes refuses any path below /tmp, which is world-writable. This directory is not.
fi
chmod 755 "$state"

# The key, in a file with the owner that sshd requires. No process started below inherits the variable.
(umask 077 && printf '%s\n' "$SSH_PUBLIC_KEY" >"$state/authorized_keys")
[ "$uid" -eq "$own" ] || chown "$uid:$gid" "$state/authorized_keys"
unset SSH_PUBLIC_KEY

# As root, sshd refuses even key logins to an account whose password starts with "!", which is what useradd sets. It
# accepts key logins with "*", which also rules out a password login.
if [ "$own" -eq 0 ] && grep -q "^$user:!" /etc/shadow; then
  sed -i "s/^$user:![^:]*:/$user:*:/" /etc/shadow 2>/dev/null ||
    fail "the account $user is locked, and /etc/shadow cannot be written: unlock it in the image (usermod -p '*' $user)"
fi

# New host keys for each container. Clients prefer ed25519; FIPS mode requires ecdsa. No rsa: generating such a key can
# take seconds on a quarter of a vCPU.
[ ! -e "$state/host_ed25519" ] || rm -f "$state"/host_* # the container was restarted
for type in ed25519 ecdsa; do
  ssh-keygen -q -t "$type" -N '' -C '' -f "$state/host_$type"
done

# sshd starts sessions with a new environment. Pass the container's variables to them as well: those from the image's
# ENV, from the task definition's `environment` and `secrets`, and from ECS. Leave out variables that each login sets
# itself and variables that change how a shell works. One line per variable, NAME=value, with line breaks replaced by
# \036.
line_break=$(printf '\036')
environment=$(tr '\0\n' '\n\036' <"/proc/$$/environ" | LC_ALL=C sed -E \
  -e '/^[A-Za-z_][A-Za-z0-9_]*=/!d' \
  -e '/^(SSH_.*|FARGATE_.*|HOME|USER|LOGNAME|SHELL|MAIL|PWD|OLDPWD|SHLVL|_)=/d' \
  -e '/^(UID|EUID|PPID|SHELLOPTS|BASHOPTS|BASH_ENV|BASH_XTRACEFD|ENV|IFS|PS4|POSIXLY_CORRECT)=/d')
# sshd_config cannot represent a line break.
case $environment in
  *"$line_break"*)
    broken=$(printf '%s\n' "$environment" | LC_ALL=C sed -n "s/=.*$line_break.*//p" | tr '\n' ' ')
    say "not passed to sessions, because their values contain line breaks: $broken" ;;
esac
# Quote for sshd_config, where only \ and " are special inside quotes.
set_env=$(printf '%s\n' "$environment" | LC_ALL=C sed -e "/$line_break/d" -e '/^$/d' -e 's/[\\"]/\\&/g' -e 's/.*/"&"/' |
  tr '\n' ' ')

# Options that not every sshd has. sshd refuses to start if it does not know an option, and logs a warning if it was built
# without one. So set only those that it accepts without a complaint.
#   UsePAM              Alpine's sshd is built without PAM. With PAM, its loginuid module ends every session if the
#                       container may not set a login uid.
#   PerSourcePenalties  since 9.8, sshd refuses an address after failed logins. Behind a NAT gateway, the driver's address
#                       may be that of others, too; and the driver tries to log in until the container is ready.
accepts() {
  printf '%s\n' "HostKey $state/host_ed25519" "$1" >"$state/probe"
  complaint=$(/usr/sbin/sshd -t -f "$state/probe" 2>&1) && [ -z "$complaint" ]
}
optional=
for line in 'UsePAM no' 'PerSourcePenalties no'; do
  if accepts "$line"; then
    optional="$optional$line
"
  fi
done

# The complete configuration: the image's /etc/ssh/sshd_config is not used.
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
$optional
DisableForwarding yes
# Before 10.0, DisableForwarding has no effect on these two, unless the distribution has corrected it.
X11Forwarding no
AllowAgentForwarding no

# The driver needs few connections and channels. The limits are high so that it still gets in while others, such as
# port scanners, hold connections open: at the default, sshd drops connections at random from the tenth on.
MaxStartups 100
MaxSessions 100
# Notice that the driver's host has gone, and keep the connection in the tables of NAT gateways, which forget it after
# 350 s of silence. The session of a driver that is only delayed must not end: by default, the driver itself gives up
# after 45 s of silence; sshd, after 300 s.
TCPKeepAlive yes
ClientAliveInterval 30
ClientAliveCountMax 10

# sshd uses only the first SetEnv line, so all variables are on one line. No AcceptEnv. With FARGATE_ENVIRONMENT=passed
# the driver does not look for the container's environment itself.
SetEnv FARGATE_ENVIRONMENT=passed $set_env
END
)

# Ends the container at the deadline, so that an orphaned task does not run, and cost money, for ever. It does not
# protect against a hostile job, which is root. It checks the clock every minute because the clock may be adjusted. It
# repeats TERM because process 1 ignores it until sshd is ready. It ignores signals so that a job's `kill -TERM -1` does
# not end it.
watch_deadline() {
  trap '' HUP INT TERM
  while left=$((deadline - $(date +%s))) && [ "$left" -gt 0 ]; do
    [ "$left" -lt 60 ] || left=60
    sleep "$left" || :
  done
  say "the deadline $deadline has passed: ending the container"
  # $$ is the entry point's process, which has become sshd.
  while kill -TERM $$ 2>/dev/null; do
    sleep 10 || :
  done
}
if [ -n "$deadline" ]; then watch_deadline & fi

# sshd becomes process 1, unless the container has an init process. TERM ends it at once, and the kernel then ends every
# other process of the container. As process 1 it reaps orphaned processes as an init does, and no job can kill it.
exec /usr/sbin/sshd -D -e -f "$state/config"

#!/bin/sh
# Entry point of the worker container: lets one public key in, then becomes sshd.
#
#   SSH_PUBLIC_KEY  required; the key that may log in, as a line of authorized_keys
#   SSH_USER        the account it logs in to, which must exist (root)
#   SSH_PORT        the port sshd listens on (22)
#   FARGATE_DEADLINE
#                   when the container ends by itself, in seconds since 1970 (never)
#
# POSIX sh, so that it serves in images without bash too. Needs getent, ssh-keygen and sshd.
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
    deadline=${FARGATE_DEADLINE#"${FARGATE_DEADLINE%%[!0]*}"} # without the zeros that would make it octal
    deadline=${deadline:-0}
    if [ "$deadline" -le "$(date +%s)" ]; then
      say "the deadline $deadline has passed: nothing is started"
      exit 124 # as timeout(1)
    fi ;;
esac
unset FARGATE_DEADLINE

user=${SSH_USER:-root}
[ -n "${SSH_PUBLIC_KEY:-}" ] ||
  fail "SSH_PUBLIC_KEY is not set: give the container the public key that may log in"
account=$(getent passwd "$user") ||
  fail "SSH_USER is '$user', but this image has no such user"
IFS=: read -r user _ uid gid _ home _ <<END
$account
END

# The key, owned as sshd's StrictModes wants it. The variable has done its work: nothing below inherits it.
mkdir -p "$home/.ssh"
printf '%s\n' "$SSH_PUBLIC_KEY" >"$home/.ssh/authorized_keys"
chmod 700 "$home/.ssh"
chmod 600 "$home/.ssh/authorized_keys"
chown "$uid:$gid" "$home/.ssh" "$home/.ssh/authorized_keys"
unset SSH_PUBLIC_KEY

# sshd refuses an account whose password starts with "!", as useradd leaves it, even for a key.
# "*" is as impossible to log in with, but is not refused.
sed -i "s/^$user:![^:]*:/$user:*:/" /etc/shadow

# Host keys of this container alone, in a directory that no image layer fills. ed25519 is what clients
# prefer, ecdsa is for those held to FIPS. No rsa: making it can take seconds on a quarter of a vCPU.
state=/run/sshd # also the directory in which sshd isolates its unprivileged half
mkdir -p "$state"
chmod 755 "$state"
for type in ed25519 ecdsa; do
  rm -f "$state/host_$type" "$state/host_$type.pub"
  ssh-keygen -q -t "$type" -N '' -C '' -f "$state/host_$type"
done

# sshd starts sessions with an environment of its own. Jobs get from the container's the image's PATH, and what the
# AWS SDKs need to act as the task role and to know where they run.
set_env=
for name in PATH \
  AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_CONTAINER_CREDENTIALS_FULL_URI \
  AWS_CONTAINER_AUTHORIZATION_TOKEN AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE \
  AWS_REGION AWS_DEFAULT_REGION AWS_EXECUTION_ENV \
  ECS_CONTAINER_METADATA_URI ECS_CONTAINER_METADATA_URI_V4; do
  eval "value=\${$name:-}"
  [ -n "$value" ] || continue
  # Quoted for sshd_config, where only \ and " are special inside quotes and a line break ends the line.
  value=$(printf %s "$value" | tr -d '\n\r' | sed 's/[\\"]/\\&/g')
  set_env="$set_env \"$name=$value\""
done

# The whole configuration, so that nothing depends on the image's /etc/ssh/sshd_config.
(
  umask 077
  cat >"$state/config" <<END
Port ${SSH_PORT:-22}
HostKey $state/host_ed25519
HostKey $state/host_ecdsa
PidFile none
UseDNS no
PrintMotd no

AllowUsers $user
PermitRootLogin prohibit-password
AuthenticationMethods publickey
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
# Without PAM: its loginuid module ends every session where the container may not set a login uid.
UsePAM no

DisableForwarding yes
X11Forwarding no
# Only the first SetEnv line counts, so all pairs stand on one. There is no AcceptEnv.
${set_env:+SetEnv$set_env}
END
)

# So that a task that nobody stops does not run, and cost, for ever; no defence against a hostile job, which is root.
# Looks at the clock once a minute, because it may be set meanwhile. Asks again until it is heard, because process 1
# hears no TERM before sshd is ready. Deaf itself, so that a job's `kill -TERM -1` does not end it.
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

# As process 1: TERM ends sshd at once, and with it the kernel ends the container and every session.
exec /usr/sbin/sshd -D -e -f "$state/config"

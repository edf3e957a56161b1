//! Keys and tokens: who else can read them, and whether this host's certificate is still valid.

use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use identity::{NodeError, NodeIdentity, secret_file::ReadSecretError};
use model::Timestamp;

use super::{Check, Checks, Look, Role, Topic, topic};
use crate::{exit::chain, out::units::show_time};

pub(super) const TOPICS: &[&Topic] = &[&topic::PRIVATE, &topic::IDENTITY];

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Renewal begins when 60 of 90 days are left: with fewer than these it has failed for long.
const RENEWED_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

pub(super) fn look(look: &Look) -> Checks {
    let mut checks = private(look);
    checks.push(identity(look, SystemTime::now()));
    checks
}

/// Files and directories that only their owner may read, of this machine's roles.
fn secrets(look: &Look) -> Vec<PathBuf> {
    let has = |role| look.roles.contains(&role);
    let mut paths = Vec::new();
    if let Some(agent) = look.places.agent.as_ref().filter(|_| has(Role::Agent)) {
        paths.extend([agent.clone(), agent.join("identity.pem"), agent.join("membership.json")]);
    }
    if let Some(controller) = look.places.controller.as_ref().filter(|_| has(Role::Controller)) {
        let state = controller::StateDir::new(controller);
        paths.extend([
            controller.clone(),
            state.authority(),
            state.authority().join("authority.pem"),
            state.admin_token(),
        ]);
    }
    let asked = look.asked.server.token_file.clone();
    paths.extend(asked.or_else(|| look.variable("GODWIT_TOKEN_FILE").map(PathBuf::from)));
    paths
}

fn private(look: &Look) -> Checks {
    let topic = &topic::PRIVATE;
    let (mut checks, mut good, mut hidden) = (Vec::new(), 0, false);
    let user = rustix::process::geteuid().as_raw();
    for path in secrets(look) {
        match std::fs::metadata(look.path(&path)) {
            Ok(data) => match open_to_others(look, &path, &data, user) {
                Some(check) => checks.push(check.about(path.display().to_string())),
                None => good += 1,
            },
            Err(error) => hidden |= error.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    if checks.is_empty() {
        checks.push(match (good, hidden) {
            (_, true) => Check::needs_root(topic, "this user may not look at all of them"),
            (0, false) => Check::ok(topic, "there are no keys here yet"),
            (good, false) => Check::ok(topic, format!("{good} files and directories, open to their owner only")),
        });
    }
    checks
}

fn open_to_others(look: &Look, path: &Path, data: &Metadata, user: u32) -> Option<Check> {
    let topic = &topic::PRIVATE;
    let mode = data.mode() & 0o777;
    let shown = path.display();
    if data.uid() != 0 && data.uid() != user {
        let mend = look.command(&format!("chown root {shown}"));
        return Some(Check::problem(topic, format!("belongs to user {}", data.uid()), mend));
    }
    let right = if data.is_dir() { "700" } else { "600" };
    let mend = look.command(&format!("chmod {right} {shown}"));
    let seen = format!("mode {mode:04o}");
    match (mode & 0o077, data.is_dir()) {
        (0, _) => None,
        // Its files have modes of their own.
        (others, true) if others & 0o022 == 0 => Some(Check::warning(topic, seen + ": others can look in", mend)),
        (_, true) => Some(Check::problem(topic, seen + ": others can change what is in it", mend)),
        (_, false) => {
            let mend = format!("{mend}; its secret may be known: replace it");
            Some(Check::problem(topic, seen + ": others can read or write it", mend))
        }
    }
}

fn identity(look: &Look, now: SystemTime) -> Check {
    let topic = &topic::IDENTITY;
    let join = "on the controller: godwit host add-token; here what it prints";
    let Some(path) = look.places.agent.as_ref().map(|agent| agent.join("identity.pem")) else {
        return Check::skipped(topic, "no agent's state is known").mend("name it: --state DIR");
    };
    match NodeIdentity::load(&look.path(&path)) {
        Ok(identity) => valid_until(look, identity.peer().not_after, now),
        Err(NodeError::Read(ReadSecretError::Io { source, .. })) => match source.kind() {
            io::ErrorKind::NotFound => Check::skipped(topic, "this machine has joined no cell").mend(join),
            io::ErrorKind::PermissionDenied if !look.is_root => Check::needs_root(topic, "this user may not read it"),
            _ => Check::problem(topic, format!("{}: {source}", path.display()), "see dmesg"),
        },
        Err(error) => Check::problem(
            topic,
            chain(&error),
            format!(
                "restore {} from a backup; or remove it and membership.json, and join again ({join})",
                path.display()
            ),
        ),
    }
}

fn valid_until(look: &Look, end: SystemTime, now: SystemTime) -> Check {
    let topic = &topic::IDENTITY;
    let until = end
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_millis()).ok());
    let until = show_time(Timestamp(until.unwrap_or(0)));
    match end.duration_since(now) {
        Err(_) => Check::problem(
            topic,
            format!("its certificate ran out at {until}"),
            "set the clock right if it is wrong; else remove identity.pem and membership.json, and join again: on the controller, godwit host add-token",
        ),
        Ok(left) if left < RENEWED_BEFORE => Check::warning(
            topic,
            format!(
                "its certificate is valid until {until}, {} days more; it should have been renewed",
                left.as_secs() / DAY.as_secs()
            ),
            format!(
                "start the agent and see why it has no session: {}",
                look.command("journalctl -u godwit-agent")
            ),
        ),
        Ok(_) => Check::ok(topic, format!("its certificate is valid until {until}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::{
        State,
        look::tests::{Fake, empty},
    };
    use super::*;

    const AGENT: &str = "/var/lib/godwit/agent";

    fn joined(directory_mode: u32, file_mode: u32) -> Fake {
        let fake = empty().with(&format!("{AGENT}/identity.pem"), "no key");
        let set = |path: &str, mode| {
            std::fs::set_permissions(fake.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&format!("{AGENT}/identity.pem"), file_mode);
        set(AGENT, directory_mode);
        fake
    }

    #[test]
    fn keys_are_private_or_the_command_that_makes_them_so_is_told() {
        let of = |directory, file| private(&joined(directory, file).look());
        let good = of(0o700, 0o600);
        assert_eq!((good.len(), good[0].state), (1, State::Ok));
        assert_eq!(of(0o755, 0o600)[0].state, State::Warning);
        assert_eq!(of(0o777, 0o600)[0].state, State::Problem);
        let open = of(0o700, 0o640);
        assert_eq!((open.len(), open[0].state), (1, State::Problem));
        assert!(
            open[0]
                .mend
                .as_ref()
                .unwrap()
                .starts_with(&format!("chmod 600 {AGENT}/identity.pem"))
        );
        assert!(private(&empty().look())[0].seen.contains("no keys here yet"));
    }

    #[test]
    fn a_strangers_file_is_told() {
        let fake = joined(0o700, 0o600);
        let data = std::fs::metadata(fake.path(AGENT)).unwrap();
        // To user 4711, a file of ours is a stranger's, unless it is root's.
        let found = open_to_others(&fake.look(), Path::new(AGENT), &data, 4711);
        assert_eq!(found.is_some(), data.uid() != 0);
    }

    #[test]
    fn an_identity_is_valid_due_over_damaged_or_absent() {
        let (now, look) = (SystemTime::UNIX_EPOCH + 20_000 * DAY, empty().look());
        let of = |left: Duration| valid_until(&look, now + left, now);
        assert_eq!(of(80 * DAY).state, State::Ok);
        assert_eq!(of(10 * DAY).state, State::Warning);
        assert!(of(10 * DAY).seen.contains("10 days more"));
        assert_eq!(valid_until(&look, now - DAY, now).state, State::Problem);
        assert_eq!(identity(&look, now).state, State::Skipped);
        assert_eq!(identity(&joined(0o700, 0o600).look(), now).state, State::Problem);
    }

    #[test]
    fn a_real_identity_is_read() {
        let now = SystemTime::now();
        let fake = empty();
        let cluster = uuid::Uuid::from_u128(1);
        let authority = identity::ClusterAuthority::create(&fake.path("/ca"), cluster, now).unwrap();
        let key = identity::NodeKey::generate().unwrap();
        let role = identity::Role::Host(uuid::Uuid::from_u128(2));
        let certificate = authority.issue(&key.request().unwrap(), role, now).unwrap();
        let node = NodeIdentity::new(key, certificate.to_vec(), authority.certificate().clone()).unwrap();
        std::fs::create_dir_all(fake.path(AGENT)).unwrap();
        node.save(&fake.path(&format!("{AGENT}/identity.pem"))).unwrap();
        assert_eq!(super::identity(&fake.look(), now).state, State::Ok);
        let later = now + identity::NODE_VALIDITY + DAY;
        assert_eq!(super::identity(&fake.look(), later).state, State::Problem);
    }
}

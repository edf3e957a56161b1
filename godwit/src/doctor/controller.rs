//! The controller, asked as this machine asks it: as a host with its certificate, as a client with its token.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent::Membership;
use identity::{Address, NodeIdentity, secret_file, tls};
use time::{OffsetDateTime, PrimitiveDateTime, format_description::FormatItem, macros::format_description};
use tokio::{net::TcpStream, time::timeout};

use super::{Check, Checks, Look, Role, State, Topic, topic};
use crate::{
    client::{Client, Greeting, locate::locate},
    exit::{Exit, Failure, chain},
};

pub(super) const TOPICS: &[&Topic] = &[
    &topic::CONTROLLER_REACHED,
    &topic::CONTROLLER_VERSION,
    &topic::CONTROLLER_CLOCK,
];

/// Longest wait for a connection, and for its handshake.
const STEP_MAX: Duration = Duration::from_secs(1);
/// Longest wait for a client's answer, all in all.
const ANSWER_MAX: Duration = Duration::from_millis(2500);
const MEMBERSHIP_BYTES_MAX: u64 = 64 << 10;

/// The form of a `Date` header (RFC 9110, section 5.6.7).
const DATE: &[FormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
/// Headers tell whole seconds, and answers take their time.
const SKEW_GOOD: Duration = Duration::from_secs(5);
/// Certificates are dated back by so much.
const SKEW_MAX: Duration = Duration::from_secs(24 * 3600);

pub(super) async fn look(look: &Look) -> Checks {
    let has = |role| look.roles.contains(&role);
    let as_host = async {
        match has(Role::Agent) && look.is_real {
            true => as_host(look).await,
            false => None,
        }
    };
    let as_client = async {
        match has(Role::Client) && look.is_real {
            true => as_client(look).await,
            false => Vec::new(),
        }
    };
    let (host, mut checks) = tokio::join!(as_host, as_client);
    checks.extend(host);
    for topic in TOPICS {
        if !checks.iter().any(|check| check.id == topic.id) {
            let mend = "once there is one: give it with --server, --ca and --token-file, or join as a host";
            checks.push(Check::skipped(topic, "no controller was asked").mend(mend));
        }
    }
    checks
}

/// With this host's certificate, on the port of agents. `None` where this machine has joined no cell.
async fn as_host(look: &Look) -> Option<Check> {
    let topic = &topic::CONTROLLER_REACHED;
    let agent = look.places.agent.as_ref()?;
    let file = look.path(agent.join("membership.json"));
    match std::fs::metadata(&file) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied && !look.is_root => {
            return Some(
                Check::needs_root(topic, "this user may not read which cell this host has joined").about("host"),
            );
        }
        Err(_) => return None,
    }
    let bytes = secret_file::read(&file, MEMBERSHIP_BYTES_MAX);
    let text = bytes.map_err(|error| chain(&error));
    let membership = text.and_then(|text| serde_json::from_slice::<Membership>(&text).map_err(|error| chain(&error)));
    let identity = NodeIdentity::load(&look.path(agent.join("identity.pem")));
    let check = match (membership, identity) {
        (Ok(membership), Ok(identity)) => match handshake(&membership.controller, &identity).await {
            Ok(()) => Check::ok(
                topic,
                format!("{} takes this host's certificate", membership.controller),
            ),
            Err(why) => Check::problem(
                topic,
                format!("{}: {why}", membership.controller),
                "start the controller; see that no firewall is between: nc -vz ADDRESS PORT",
            ),
        },
        (Err(why), _) => Check::problem(topic, why, "restore membership.json, or remove it and join again"),
        (_, Err(error)) => Check::problem(topic, chain(&error), format!("see {}", topic::IDENTITY.id)),
    };
    Some(check.about("host"))
}

async fn handshake(controller: &str, identity: &NodeIdentity) -> Result<(), String> {
    let address: Address = controller
        .parse()
        .map_err(|error: identity::AddressError| chain(&error))?;
    let stream = timeout(STEP_MAX, TcpStream::connect((address.host.as_str(), address.port))).await;
    let stream = stream
        .map_err(|_| format!("no answer within {} s", STEP_MAX.as_secs()))?
        .map_err(|error| chain(&error))?;
    let config = Arc::new(tls::to_controller(identity).map_err(|error| chain(&error))?);
    let connected = tls::connect(&config, tls::unnamed(), stream, STEP_MAX).await;
    connected.map(|_| ()).map_err(|error| chain(&error))
}

/// With a token, on the port of clients.
async fn as_client(look: &Look) -> Checks {
    let located = locate(&look.asked.server, |name| look.environment.get(name).cloned());
    let server = match located {
        Ok(server) => server,
        Err(failure) => return vec![not_located(&failure).about("client")],
    };
    let asked_at = SystemTime::now();
    let asked = timeout(ANSWER_MAX, Client::new(server).greeting()).await;
    let answered_at = SystemTime::now();
    let answered = asked.unwrap_or_else(|_| {
        let message = format!("no answer within {:.1} s", ANSWER_MAX.as_secs_f64());
        Err(Failure::new(Exit::Unreachable, message).hint("start the controller; see that no firewall is between"))
    });
    let checks = match answered {
        Err(failure) => vec![Check::problem(
            &topic::CONTROLLER_REACHED,
            failure.message(),
            failure.advice(),
        )],
        Ok(greeting) => {
            // As if it was answered in the middle.
            let waited = answered_at.duration_since(asked_at).unwrap_or_default();
            vec![
                Check::ok(
                    &topic::CONTROLLER_REACHED,
                    format!(
                        "{} answers within {} ms and knows the token",
                        greeting.address,
                        waited.as_millis()
                    ),
                ),
                version(&greeting, env!("CARGO_PKG_VERSION")),
                clock(&greeting, asked_at + waited / 2),
            ]
        }
    };
    checks.into_iter().map(|check| check.about("client")).collect()
}

fn not_located(failure: &Failure) -> Check {
    // That no server is known is no fault of a machine that is still to become something.
    let state = match failure.exit() {
        Exit::Unreachable => State::Skipped,
        _ => State::Problem,
    };
    Check::new(&topic::CONTROLLER_REACHED, state, failure.message()).mend(failure.advice())
}

fn version(greeting: &Greeting, own: &str) -> Check {
    let topic = &topic::CONTROLLER_VERSION;
    // Until 1.0 the second number may break things.
    let series = |version: &str| version.splitn(3, '.').take(2).map(str::to_owned).collect::<Vec<_>>();
    match &greeting.version {
        Some(theirs) if series(theirs) == series(own) => Check::ok(topic, format!("it is {theirs}, this is {own}")),
        Some(theirs) => Check::warning(
            topic,
            format!("it is {theirs}, this is {own}"),
            format!("install godwit {theirs} here, or {own} there"),
        ),
        None => Check::warning(
            topic,
            "it does not say its version",
            "check the address: it may not be godwit's own port, or something is between that changes answers",
        ),
    }
}

fn clock(greeting: &Greeting, now: SystemTime) -> Check {
    let topic = &topic::CONTROLLER_CLOCK;
    let theirs = greeting
        .date
        .as_deref()
        .and_then(|date| PrimitiveDateTime::parse(date, DATE).ok());
    let Some(theirs) = theirs else {
        return Check::skipped(topic, "it does not tell the time").mend("compare by hand: date -u on both");
    };
    // A header tells a whole second: half of one is what it means.
    let difference = OffsetDateTime::from(now) - (theirs.assume_utc() + time::Duration::milliseconds(500));
    let skew = difference.unsigned_abs();
    if skew < SKEW_GOOD {
        return Check::ok(topic, "the same as here, within the second that can be seen");
    }
    let side = if difference.is_positive() { "ahead of" } else { "behind" };
    let seen = format!("this machine's clock is {} s {side} the controller's", skew.as_secs());
    let mend = format!("keep both clocks in step (see {})", topic::CLOCK.id);
    if skew < SKEW_MAX {
        Check::warning(topic, seen, mend)
    } else {
        Check::problem(topic, seen, mend)
    }
}

#[cfg(test)]
mod tests {
    use super::super::look::tests::empty;
    use super::*;

    fn greeting(version: Option<&str>, date: Option<&str>) -> Greeting {
        Greeting {
            address: "c:7443".to_owned(),
            version: version.map(str::to_owned),
            date: date.map(str::to_owned),
        }
    }

    #[test]
    fn versions_of_one_series_go_together() {
        let of = |theirs| version(&greeting(theirs, None), "0.1.3").state;
        assert_eq!(of(Some("0.1.0")), State::Ok);
        assert_eq!(of(Some("0.2.0")), State::Warning);
        assert_eq!(of(Some("strange")), State::Warning);
        assert_eq!(of(None), State::Warning);
    }

    #[test]
    fn clocks_are_compared_by_the_date_that_the_controller_tells() {
        let told = greeting(None, Some("Sun, 06 Nov 1994 08:49:37 GMT"));
        let at = |seconds: i64| {
            let moment = 784_111_777_i64.saturating_add(seconds);
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(moment).unwrap())
        };
        assert_eq!(clock(&told, at(0)).state, State::Ok);
        assert_eq!(clock(&told, at(-3)).state, State::Ok);
        let behind = clock(&told, at(-600));
        assert_eq!(behind.state, State::Warning);
        assert!(behind.seen.contains("600 s behind"), "{}", behind.seen);
        assert!(clock(&told, at(60)).seen.contains("ahead of"));
        assert_eq!(clock(&told, at(90_000)).state, State::Problem);
        assert_eq!(clock(&greeting(None, Some("yesterday")), at(0)).state, State::Skipped);
        assert_eq!(clock(&greeting(None, None), at(0)).state, State::Skipped);
    }

    #[tokio::test]
    async fn a_machine_that_knows_no_controller_is_not_blamed() {
        let mut look = empty().look();
        look.is_real = true;
        look.asked.server.state = Some("/nonexistent".into());
        let located = Failure::new(Exit::Unreachable, "no server is known").hint("start one");
        assert_eq!(not_located(&located).state, State::Skipped);
        let open = Failure::new(Exit::Failed, "the token is open to others").hint("chmod");
        assert_eq!(not_located(&open).state, State::Problem);
        assert!(as_host(&look).await.is_none());
        let joined = empty().with("/var/lib/godwit/agent/membership.json", "{");
        let damaged = as_host(&joined.look()).await.unwrap();
        assert_eq!(damaged.state, State::Problem);
    }
}

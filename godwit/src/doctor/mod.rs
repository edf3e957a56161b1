//! What a machine lacks to be a host, a controller or a client, and how to mend it. Reads and tries; changes nothing.
//!
//! ```text
//!   Look (root, places, flags) ──▶ groups, all at once, each with its deadline ──▶ checks: id, state, seen, why, mend
//!     machine │ qemu │ network │ ports │ storage (one a directory) │ clock │ trust │ controller
//! ```
//!
//! A group that hangs (a network file system whose server is away) costs its own checks, not the others'.

mod clock;
mod controller;
mod look;
mod machine;
mod network;
mod ports;
mod process;
mod qemu;
mod storage;
mod sys;
mod topic;
mod trust;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde::Serialize;
use tokio::{sync::oneshot, time::timeout};

pub(crate) use look::{Asked, Look};
pub(crate) use topic::{Role, Topic};

/// How long most groups may take: reading a few files, starting a small program.
const SHORT: Duration = Duration::from_secs(3);
/// How long the longest may take.
const LONG: Duration = Duration::from_millis(4800);

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// As it should be.
    Ok,
    /// It works, and less well, less safely or not in every case.
    Warning,
    /// It does not work until this is mended.
    Problem,
    /// It could not be looked at.
    Skipped,
}

impl State {
    /// The word for it.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
            Self::Skipped => "skipped",
        }
    }
}

/// One check and what it found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// Stable.
    pub(crate) id: &'static str,
    /// Which directory, file or port, where a check is of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) about: Option<String>,
    /// How it came out.
    pub(crate) state: State,
    /// What was seen.
    pub(crate) seen: String,
    /// Why it matters.
    pub(crate) why: &'static str,
    /// The command or line that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mend: Option<String>,
}

impl Check {
    fn new(topic: &Topic, state: State, seen: impl Into<String>) -> Self {
        Self {
            id: topic.id,
            about: None,
            state,
            seen: seen.into(),
            why: topic.why,
            mend: None,
        }
    }

    fn ok(topic: &Topic, seen: impl Into<String>) -> Self {
        Self::new(topic, State::Ok, seen)
    }

    fn warning(topic: &Topic, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(topic, State::Warning, seen).mend(mend)
    }

    fn problem(topic: &Topic, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(topic, State::Problem, seen).mend(mend)
    }

    fn skipped(topic: &Topic, seen: impl Into<String>) -> Self {
        Self::new(topic, State::Skipped, seen)
    }

    fn needs_root(topic: &Topic, seen: impl Into<String>) -> Self {
        Self::skipped(topic, seen).mend("sudo godwit doctor")
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }

    fn about(mut self, about: impl Into<String>) -> Self {
        self.about = Some(about.into());
        self
    }
}

type Checks = Vec<Check>;
type Waiting<'a> = Pin<Box<dyn Future<Output = Checks> + 'a>>;

/// Checks that are made together, under one deadline.
struct Group {
    topics: &'static [&'static Topic],
    about: Option<String>,
    deadline: Duration,
    work: Work,
}

enum Work {
    /// Blocks; runs on a thread, which is left behind when it is out of time.
    Blocking(Box<dyn FnOnce(&Look) -> Checks + Send>),
    /// Waits; ends when it is dropped.
    Waiting(for<'a> fn(&'a Look) -> Waiting<'a>),
}

impl Group {
    fn reads(topics: &'static [&'static Topic], work: fn(&Look) -> Checks) -> Self {
        Self::about(topics, None, work)
    }

    fn about(
        topics: &'static [&'static Topic],
        about: Option<String>,
        work: impl FnOnce(&Look) -> Checks + Send + 'static,
    ) -> Self {
        Self {
            topics,
            about,
            deadline: SHORT,
            work: Work::Blocking(Box::new(work)),
        }
    }

    fn waits(topics: &'static [&'static Topic], deadline: Duration, work: for<'a> fn(&'a Look) -> Waiting<'a>) -> Self {
        Self {
            topics,
            about: None,
            deadline,
            work: Work::Waiting(work),
        }
    }

    async fn run(self, look: &Arc<Look>) -> Checks {
        let (topics, about, deadline) = (self.topics, self.about, self.deadline);
        let done = match self.work {
            Work::Waiting(work) => timeout(deadline, work(look)).await.ok(),
            Work::Blocking(work) => {
                let (answer, answered) = oneshot::channel();
                let look = Arc::clone(look);
                let thread = std::thread::Builder::new().spawn(move || {
                    // Nobody waits where it took too long.
                    let _ = answer.send(work(&look));
                });
                match thread {
                    Ok(_) => timeout(deadline, answered).await.ok().and_then(Result::ok),
                    Err(_) => None,
                }
            }
        };
        done.unwrap_or_else(|| {
            let late = |topic: &&Topic| Check {
                about: about.clone(),
                ..Check::warning(
                    topic,
                    format!("no answer within {:.1} s", deadline.as_secs_f64()),
                    "look again when the machine is less busy; if it stays so, what is asked hangs (dmesg says more)",
                )
            };
            topics.iter().map(late).collect()
        })
    }
}

fn groups(look: &Look) -> Vec<Group> {
    let mut groups = vec![
        Group::reads(machine::TOPICS, machine::look),
        Group::waits(qemu::TOPICS, LONG, |look| Box::pin(qemu::look(look))),
        Group::reads(qemu::IMG_TOPICS, qemu::look_at_qemu_img),
        Group::reads(network::TRIED, network::try_kinds),
        Group::reads(network::TOPICS, network::look),
        Group::reads(ports::TOPICS, ports::look),
        Group::reads(clock::TOPICS, clock::look),
        Group::reads(trust::TOPICS, trust::look),
        Group::waits(controller::TOPICS, SHORT, |look| Box::pin(controller::look(look))),
    ];
    groups.extend(storage::directories(look).into_iter().map(|directory| {
        let about = Some(directory.path.display().to_string());
        Group::about(directory.topics(), about, move |look| storage::look(look, &directory))
    }));
    groups
}

/// Makes all checks that concern the roles of this machine; ends within 5 s.
pub(crate) async fn examine(look: Look) -> Checks {
    let wanted = |topic: &&&Topic| topic.roles.iter().any(|role| look.roles.contains(role));
    let ids: Vec<&str> = topic::ALL.iter().filter(wanted).map(|topic| topic.id).collect();
    let look = Arc::new(look);
    let groups = groups(&look)
        .into_iter()
        .filter(|group| group.topics.iter().any(|topic| ids.contains(&topic.id)));
    let found = join_all(groups.map(|group| group.run(&look))).await;
    let mut checks: Checks = found
        .into_iter()
        .flatten()
        .filter(|check| ids.contains(&check.id))
        .collect();
    checks.sort_by_key(|check| ids.iter().position(|id| *id == check.id));
    checks
}

/// The ids of the checks in a state.
pub(crate) fn in_state(checks: &[Check], state: State) -> impl Iterator<Item = &Check> {
    checks.iter().filter(move |check| check.state == state)
}

/// Names in a row, the first few of many.
fn some(names: &[String]) -> String {
    const SHOWN_MAX: usize = 6;
    let more = names.len().saturating_sub(SHOWN_MAX);
    let shown = names[..names.len().min(SHOWN_MAX)].join(", ");
    match more {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_group_that_hangs_costs_its_own_checks_and_says_so() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let mut group = Group::about(storage::STATE_TOPICS, Some("/nfs".to_owned()), move |_| {
            let _ = held.recv();
            Vec::new()
        });
        group.deadline = Duration::from_millis(100);
        let look = Arc::new(look::tests::empty().look());
        let checks = group.run(&look).await;
        drop(hold);
        assert_eq!(checks.len(), 2);
        assert_eq!((checks[0].id, checks[0].state), ("storage.space", State::Warning));
        assert_eq!(checks[0].about.as_deref(), Some("/nfs"));
        assert!(checks[0].seen.contains("no answer within 0.1 s"), "{}", checks[0].seen);
    }

    #[tokio::test]
    async fn only_what_concerns_a_role_is_looked_at_and_every_topic_has_its_check() {
        let roles = |roles: &[Role]| {
            let mut look = look::tests::empty().look();
            look.roles = roles.to_vec();
            look
        };
        let client = examine(roles(&[Role::Client])).await;
        assert!(client.iter().all(|check| !check.id.starts_with("qemu")), "{client:?}");
        assert!(client.iter().any(|check| check.id == "terminal"));
        let all = examine(roles(&Role::ALL)).await;
        for topic in topic::ALL {
            assert!(all.iter().any(|check| check.id == topic.id), "{} is missing", topic.id);
        }
        for check in &all {
            let silent = matches!(check.state, State::Warning | State::Problem) && check.mend.is_none();
            assert!(!silent, "{} says no mend", check.id);
        }
    }
}

//! The agents' live sessions as the loop sees them, and how far each agent's reports are taken and committed.

use std::collections::{BTreeMap, BTreeSet};

use model::{Epoch, HostId, Order, Refusal, id::Sequence, refusal::Code};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use uuid::Uuid;
use wire::{Down, session::LOST_AFTER};

/// Orders that wait for one agent to read. One that is further behind is disconnected; the outbox keeps its orders.
const ORDERS_MAX: usize = 1024;

/// What the loop tells a session besides orders.
#[derive(Clone, Debug, Default)]
pub(crate) struct SessionState {
    /// The last report that is committed.
    pub(crate) acknowledged: Sequence,
    /// Why the session ends.
    pub(crate) close: Option<Refusal>,
}

/// What a new session is given.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) epoch: Epoch,
    pub(crate) received: Sequence,
    pub(crate) outbox: Vec<Order>,
    pub(crate) orders: mpsc::Receiver<Down>,
    pub(crate) state: watch::Receiver<SessionState>,
}

/// A session's ends that it reads from.
pub(crate) struct Ends {
    pub(crate) orders: mpsc::Receiver<Down>,
    pub(crate) state: watch::Receiver<SessionState>,
}

#[derive(Debug)]
struct Session {
    id: Uuid,
    orders: mpsc::Sender<Down>,
    state: watch::Sender<SessionState>,
}

/// How far one run of an agent has been heard.
#[derive(Clone, Copy, Debug)]
struct Heard {
    incarnation: Uuid,
    /// The last report that was decided on.
    taken: Sequence,
    /// The last one that is committed.
    committed: Sequence,
}

/// What to do with a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Decide on it.
    Take,
    /// It was decided on before, or it is of a session that is over.
    Drop,
}

/// All live sessions.
#[derive(Debug, Default)]
pub(crate) struct Links {
    sessions: BTreeMap<HostId, Session>,
    heard: BTreeMap<HostId, Heard>,
    /// Hosts whose link is stored as up and that have no session, since when.
    missing: BTreeMap<HostId, Instant>,
}

impl Links {
    /// The hosts that have a session.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = HostId> + '_ {
        self.sessions.keys().copied()
    }

    pub(crate) fn count(&self) -> usize {
        self.sessions.len()
    }

    /// A new session takes the place of an older one.
    pub(crate) fn attach(&mut self, host: HostId, id: Uuid, incarnation: Uuid, acknowledged: Sequence) -> Ends {
        self.close(host, &Refusal::new(Code::Other, "the agent opened a newer session"));
        let fresh = Heard {
            incarnation,
            taken: acknowledged,
            committed: acknowledged,
        };
        let heard = self.heard.entry(host).or_insert(fresh);
        if heard.incarnation != incarnation || heard.committed < acknowledged {
            *heard = fresh;
        }
        let (orders, orders_end) = mpsc::channel(ORDERS_MAX);
        let (state, state_end) = watch::channel(SessionState {
            acknowledged: heard.committed,
            close: None,
        });
        self.sessions.insert(host, Session { id, orders, state });
        self.missing.remove(&host);
        Ends {
            orders: orders_end,
            state: state_end,
        }
    }

    /// Whether this session is the host's present one.
    pub(crate) fn is_live(&self, host: HostId, id: Uuid) -> bool {
        self.sessions.get(&host).is_some_and(|session| session.id == id)
    }

    /// Looks at a report's number. A gap ends the session: the agent then sends again from what was committed.
    pub(crate) fn hear(&mut self, host: HostId, id: Uuid, sequence: Sequence) -> Verdict {
        if !self.is_live(host, id) {
            return Verdict::Drop;
        }
        let Some(heard) = self.heard.get_mut(&host) else {
            return Verdict::Drop;
        };
        if sequence <= heard.taken {
            return Verdict::Drop;
        }
        if heard.taken.0.checked_add(1) != Some(sequence.0) {
            let message = format!("report {sequence} came after report {}: some are missing", heard.taken);
            self.close(host, &Refusal::new(Code::InvalidInput, message));
            return Verdict::Drop;
        }
        heard.taken = sequence;
        Verdict::Take
    }

    /// How far the host's reports are committed.
    pub(crate) fn received(&self, host: HostId) -> Sequence {
        self.heard.get(&host).map(|heard| heard.committed).unwrap_or_default()
    }

    /// All that was taken of these hosts is committed; their agents are told.
    pub(crate) fn committed(&mut self, hosts: &BTreeSet<HostId>) {
        for host in hosts {
            let Some(heard) = self.heard.get_mut(host) else {
                continue;
            };
            heard.committed = heard.taken;
            if let Some(session) = self.sessions.get(host) {
                let acknowledged = heard.committed;
                session
                    .state
                    .send_if_modified(|state| std::mem::replace(&mut state.acknowledged, acknowledged) != acknowledged);
            }
        }
    }

    /// Nothing that was taken of these hosts since the last commit counts: their agents must send it again.
    pub(crate) fn failed(&mut self, hosts: &BTreeSet<HostId>, reason: &Refusal) {
        for host in hosts {
            if let Some(heard) = self.heard.get_mut(host) {
                heard.taken = heard.committed;
            }
            self.close(*host, reason);
        }
    }

    /// Sends, if the host is connected. A host that does not read is disconnected.
    pub(crate) fn send(&mut self, host: HostId, down: Down) -> bool {
        let Some(session) = self.sessions.get(&host) else {
            return false;
        };
        if session.orders.try_send(down).is_ok() {
            return true;
        }
        let message = format!("the agent has not read {ORDERS_MAX} orders");
        self.close(host, &Refusal::new(Code::Overloaded, message));
        false
    }

    /// Ends a host's session, if it has one.
    pub(crate) fn close(&mut self, host: HostId, reason: &Refusal) {
        if let Some(session) = self.sessions.remove(&host) {
            session.state.send_modify(|state| state.close = Some(reason.clone()));
        }
    }

    /// Ends all sessions.
    pub(crate) fn close_all(&mut self, reason: &Refusal) {
        let hosts: Vec<HostId> = self.sessions.keys().copied().collect();
        hosts.into_iter().for_each(|host| self.close(host, reason));
        self.heard.values_mut().for_each(|heard| heard.taken = heard.committed);
    }

    /// A host was removed from the cell.
    pub(crate) fn forget(&mut self, host: HostId) {
        self.close(
            host,
            &Refusal::new(Code::Forbidden, "this host was removed from the cell"),
        );
        self.heard.remove(&host);
        self.missing.remove(&host);
    }

    /// A session's reader has ended; `silent`: after [`LOST_AFTER`] without a byte.
    pub(crate) fn gone(&mut self, host: HostId, id: Uuid, silent: bool, now: Instant) {
        if !self.is_live(host, id) {
            return;
        }
        self.sessions.remove(&host);
        if silent {
            self.missing.insert(host, now.checked_sub(LOST_AFTER).unwrap_or(now));
        }
    }

    /// Which of the hosts whose link is stored as up have had no session for [`LOST_AFTER`]. It covers every way in which a
    /// session can end, and the start of the process.
    pub(crate) fn lost(&mut self, up: &[HostId], now: Instant) -> Vec<HostId> {
        // Nobody writes to the agent: it went before its session began, and no reader will tell.
        self.sessions.retain(|_, session| !session.orders.is_closed());
        let mut lost = Vec::new();
        for host in up.iter().filter(|host| !self.sessions.contains_key(host)) {
            let since = *self.missing.entry(*host).or_insert(now);
            if now.saturating_duration_since(since) >= LOST_AFTER {
                lost.push(*host);
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId(Uuid::from_u128(1));
    const RUN: Uuid = Uuid::from_u128(2);

    fn session(n: u128) -> Uuid {
        Uuid::from_u128(100 + n)
    }

    #[test]
    fn reports_are_taken_once_in_order_and_a_gap_ends_the_session() {
        let mut links = Links::default();
        let ends = links.attach(HOST, session(1), RUN, Sequence(0));
        assert_eq!(links.hear(HOST, session(1), Sequence(1)), Verdict::Take);
        assert_eq!(links.hear(HOST, session(1), Sequence(1)), Verdict::Drop);
        assert_eq!(links.hear(HOST, session(9), Sequence(2)), Verdict::Drop);
        assert_eq!(links.received(HOST), Sequence(0));
        links.committed(&BTreeSet::from([HOST]));
        assert_eq!(ends.state.borrow().acknowledged, Sequence(1));
        assert_eq!(links.hear(HOST, session(1), Sequence(3)), Verdict::Drop);
        assert!(ends.state.borrow().close.is_some() && links.count() == 0);

        links.attach(HOST, session(2), RUN, Sequence(0));
        assert_eq!(links.received(HOST), Sequence(1));
        assert_eq!(links.hear(HOST, session(2), Sequence(u64::MAX)), Verdict::Drop);
        let other_run = Uuid::from_u128(3);
        links.attach(HOST, session(3), other_run, Sequence(0));
        assert_eq!(links.received(HOST), Sequence(0));
    }

    #[test]
    fn what_was_taken_but_not_committed_is_taken_again() {
        let mut links = Links::default();
        links.attach(HOST, session(1), RUN, Sequence(4));
        assert_eq!(links.hear(HOST, session(1), Sequence(5)), Verdict::Take);
        links.failed(&BTreeSet::from([HOST]), &Refusal::new(Code::ReadOnly, "full"));
        assert_eq!(links.hear(HOST, session(1), Sequence(6)), Verdict::Drop);
        links.attach(HOST, session(2), RUN, Sequence(4));
        assert_eq!(links.received(HOST), Sequence(4));
        assert_eq!(links.hear(HOST, session(2), Sequence(5)), Verdict::Take);
    }

    #[test]
    fn an_agent_that_does_not_read_is_disconnected() {
        let mut links = Links::default();
        let _ends = links.attach(HOST, session(1), RUN, Sequence(0));
        assert!((0..ORDERS_MAX).all(|_| links.send(HOST, Down::Heartbeat)));
        assert!(!links.send(HOST, Down::Heartbeat));
        assert_eq!(links.count(), 0);
    }

    #[test]
    fn a_host_is_lost_after_ten_seconds_without_a_session_or_at_once_when_it_was_silent_as_long() {
        let mut links = Links::default();
        let start = Instant::now();
        assert!(links.lost(&[HOST], start).is_empty());
        assert!(links.lost(&[HOST], start + LOST_AFTER / 2).is_empty());
        assert_eq!(links.lost(&[HOST], start + LOST_AFTER), [HOST]);
        let _ends = links.attach(HOST, session(1), RUN, Sequence(0));
        assert!(links.lost(&[HOST], start + LOST_AFTER).is_empty());
        assert!(links.lost(&[HOST], start + LOST_AFTER * 2).is_empty());
        let now = start + LOST_AFTER * 2;
        links.gone(HOST, session(1), true, now);
        assert_eq!(links.lost(&[HOST], now), [HOST]);
    }

    #[test]
    fn an_agent_that_goes_before_its_session_begins_is_lost_as_any_other() {
        let mut links = Links::default();
        let start = Instant::now();
        drop(links.attach(HOST, session(1), RUN, Sequence(0)));
        assert!(links.lost(&[HOST], start).is_empty());
        assert_eq!(links.count(), 0);
        assert_eq!(links.lost(&[HOST], start + LOST_AFTER), [HOST]);
    }
}

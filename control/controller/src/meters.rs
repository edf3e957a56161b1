//! What went through VMs' ports, as their hosts told last: telemetry, in memory alone.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use model::{Actor, HostId, PortId, Role, policy::Traffic};
use wire::{PortTraffic, session::PORTS_MAX};

use crate::committed::Committed;

/// Most ports that are kept; a host can tell of no others than those that are bound to it.
const METERS_MAX: usize = 1_000_000;

/// A family of figures: its name, what it is, and each of its figures with the label that tells it apart.
type Figures = (&'static str, &'static str, fn(&Traffic) -> Vec<(&'static str, u64)>);

const FAMILIES: [Figures; 3] = [
    (
        "godwit_port_bytes",
        "Bytes through a VM's port, as its guest sees it",
        |traffic| {
            vec![
                ("direction=\"received\"", traffic.received_bytes),
                ("direction=\"sent\"", traffic.sent_bytes),
            ]
        },
    ),
    (
        "godwit_port_frames",
        "Frames through a VM's port, as its guest sees it",
        |traffic| {
            vec![
                ("direction=\"received\"", traffic.received_frames),
                ("direction=\"sent\"", traffic.sent_frames),
            ]
        },
    ),
    (
        "godwit_port_frames_dropped",
        "Frames that the rules of a VM's port dropped",
        |traffic| {
            vec![
                ("reason=\"spoofed\"", traffic.spoofed_frames),
                ("reason=\"filtered-to-guest\"", traffic.filtered_to_guest_frames),
                ("reason=\"filtered-from-guest\"", traffic.filtered_from_guest_frames),
            ]
        },
    ),
];

/// The last figures of each port.
#[derive(Debug, Default)]
pub(crate) struct Meters(Mutex<BTreeMap<PortId, Meter>>);

/// A port's figures.
#[derive(Clone, Copy, Debug, Default)]
struct Meter {
    /// What was counted before it was begun anew: its VM was off, or its host forgot.
    before: Traffic,
    last: Traffic,
}

impl Meters {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PortId, Meter>> {
        // Each figure is whole, whoever panicked elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a host tells of the ports that are bound to it; of others it has nothing to tell.
    pub(crate) fn take(&self, host: HostId, told: &[PortTraffic], bound: impl Fn(PortId) -> Option<HostId>) {
        let mut meters = self.lock();
        for PortTraffic { port, traffic } in told.iter().take(PORTS_MAX) {
            let room = meters.len() < METERS_MAX || meters.contains_key(port);
            if bound(*port) != Some(host) || !room {
                continue;
            }
            let meter = meters.entry(*port).or_default();
            if traffic.is_before(&meter.last) {
                meter.before = meter.before.plus(meter.last);
            }
            meter.last = *traffic;
        }
    }

    /// What went through a port.
    pub(crate) fn of(&self, port: PortId) -> Option<Traffic> {
        self.lock().get(&port).map(Meter::total)
    }

    /// Forgets ports that are no more.
    pub(crate) fn keep(&self, there: impl Fn(PortId) -> bool) {
        self.lock().retain(|port, _| there(*port));
    }

    fn all(&self) -> Vec<(PortId, Traffic)> {
        self.lock().iter().map(|(port, meter)| (*port, meter.total())).collect()
    }

    /// What went through the ports of the actor's project, for cloud admins of all, in the text format of OpenMetrics. Ports that are no
    /// more are forgotten.
    pub(crate) fn scrape(&self, actor: &Actor, committed: &Committed, to: &mut String) {
        let counted = self.all();
        let bound = committed.bound(counted.iter().map(|(port, _)| *port));
        self.keep(|port| bound.contains_key(&port));
        let seen = |port: &PortId| {
            let project = bound.get(port).map(|(project, _)| *project);
            project.is_some_and(|project| actor.role == Role::CloudAdmin || project == actor.project)
        };
        let seen: Vec<_> = counted.into_iter().filter(|(port, _)| seen(port)).collect();
        for (name, help, figures) in FAMILIES {
            // Writing to a String does not fail.
            let _ = writeln!(to, "# HELP {name} {help}.\n# TYPE {name} counter");
            for (port, traffic) in &seen {
                for (label, figure) in figures(traffic) {
                    let _ = writeln!(to, "{name}_total{{port=\"{port}\",{label}}} {figure}");
                }
            }
        }
    }
}

impl Meter {
    fn total(&self) -> Traffic {
        self.before.plus(self.last)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const PORT: PortId = PortId(Uuid::from_u128(1));
    const HOSTS: [HostId; 2] = [HostId(Uuid::from_u128(2)), HostId(Uuid::from_u128(3))];

    fn told(bytes: u64) -> [PortTraffic; 1] {
        let traffic = Traffic {
            received_bytes: bytes,
            ..Traffic::default()
        };
        [PortTraffic { port: PORT, traffic }]
    }

    #[test]
    fn counters_only_grow_over_moves_and_restarts_and_only_the_ports_host_tells_them() {
        let meters = Meters::default();
        let bytes = || meters.of(PORT).map(|traffic| traffic.received_bytes);
        assert_eq!(bytes(), None);
        meters.take(HOSTS[1], &told(1 << 50), |_| Some(HOSTS[0]));
        assert_eq!(bytes(), None, "another host");
        meters.take(HOSTS[0], &told(100), |_| Some(HOSTS[0]));
        assert_eq!(bytes(), Some(100));
        // Moved: its new host counts on from there.
        meters.take(HOSTS[1], &told(130), |_| Some(HOSTS[1]));
        assert_eq!(bytes(), Some(130));
        // Started anew: it counts from nothing.
        meters.take(HOSTS[1], &told(5), |_| Some(HOSTS[1]));
        assert_eq!(bytes(), Some(135));
        meters.take(HOSTS[1], &told(9), |_| Some(HOSTS[1]));
        assert_eq!(bytes(), Some(139));
        meters.keep(|port| port != PORT);
        assert_eq!(meters.all(), []);
    }
}

//! The controller's own figures, in an explicit registry.

use std::sync::atomic::AtomicU64;
use std::{collections::BTreeMap, time::Duration};

use model::{Operation, VmState, host::Link};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode_registry},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::telemetry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct State {
    state: String,
}

/// How a login ended: `accepted`, `refused`, `too-many`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Login {
    pub(crate) result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    kind: &'static str,
    result: &'static str,
}

/// All figures. Cheap to write from anywhere.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    hosts: Family<State, Gauge>,
    vms: Family<State, Gauge>,
    operations: Family<Ended, Counter>,
    blackout: Histogram,
    migration: Histogram,
    commit: Histogram,
    pub(crate) commits_failed: Counter,
    batch: Histogram,
    pub(crate) queue: Gauge,
    pub(crate) agents: Gauge,
    pub(crate) read_only: Gauge,
    pub(crate) connections_refused: Counter,
    refused: Counter<u64, AtomicU64>,
    pub(crate) logins: Family<Login, Counter>,
}

impl Metrics {
    pub(crate) fn new(telemetry: &telemetry::Figures) -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("godwit"),
            hosts: Family::default(),
            vms: Family::default(),
            operations: Family::default(),
            // 1 ms to 16 s.
            blackout: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            // 62 ms to 17 min.
            migration: Histogram::new(exponential_buckets(0.0625, 2.0, 15)),
            // 125 us to 2 s.
            commit: Histogram::new(exponential_buckets(0.000_125, 2.0, 15)),
            commits_failed: Counter::default(),
            batch: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            queue: Gauge::default(),
            agents: Gauge::default(),
            read_only: Gauge::default(),
            connections_refused: Counter::default(),
            refused: Counter::default(),
            logins: Family::default(),
        };
        metrics.register();
        let registry = &mut metrics.registry;
        let dropped = "Figures of hosts and VMs that were not kept: too often, too many, or a full disk";
        registry.register("telemetry_dropped", dropped, telemetry.dropped.clone());
        let bytes = "Size of the file that keeps a day of figures";
        registry.register_with_unit("telemetry_file", bytes, Unit::Bytes, telemetry.bytes.clone());
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("hosts", "Hosts, by the state of their link", self.hosts.clone());
        registry.register("vms", "Virtual machines, by state", self.vms.clone());
        let ended = "Operations that ended, by kind and result";
        registry.register("operations", ended, self.operations.clone());
        let blackout = "From a migrating guest's stop to its resume, by the two hosts' clocks";
        registry.register_with_unit("migration_blackout", blackout, Unit::Seconds, self.blackout.clone());
        let migration = "From the request of a migration to the guest running on its destination";
        registry.register_with_unit("migration_duration", migration, Unit::Seconds, self.migration.clone());
        registry.register_with_unit("commit", "Commits of the store", Unit::Seconds, self.commit.clone());
        let failed = "Commits that failed";
        registry.register("commits_failed", failed, self.commits_failed.clone());
        let batch = "Events that one commit covers";
        registry.register("batch_events", batch, self.batch.clone());
        let queue = "Events that wait for the loop";
        registry.register("queue_events", queue, self.queue.clone());
        registry.register("agents_connected", "Agents with a live session", self.agents.clone());
        let read_only = "1 while the store cannot be written";
        registry.register("read_only", read_only, self.read_only.clone());
        let refused = "Connections refused because there were too many";
        registry.register("connections_refused", refused, self.connections_refused.clone());
        let refused = "Requests refused because the queue was full";
        registry.register("requests_overloaded", refused, self.refused.clone());
        registry.register("logins", "Attempts to log in, by result", self.logins.clone());
    }

    /// In the text format of OpenMetrics 1.0, without its end.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode_registry(&mut text, &self.registry);
        text
    }

    pub(crate) fn count_hosts(&self, links: impl Iterator<Item = Link>) {
        let mut counts = BTreeMap::from([("up", 0), ("lost", 0)]);
        for link in links {
            let name = match link {
                Link::Up => "up",
                Link::Lost => "lost",
            };
            *counts.entry(name).or_default() += 1;
        }
        set(
            &self.hosts,
            counts.into_iter().map(|(name, count)| (name.to_owned(), count)),
        );
    }

    pub(crate) fn count_vms(&self, states: impl Iterator<Item = VmState>) {
        let mut counts: BTreeMap<VmState, i64> = BTreeMap::new();
        states.for_each(|state| *counts.entry(state).or_default() += 1);
        // A state that nothing is in any more is 0, not gone.
        self.vms.clear();
        set(
            &self.vms,
            counts.into_iter().map(|(state, count)| (state.to_string(), count)),
        );
    }

    pub(crate) fn operation_ended(&self, operation: &Operation) {
        let labels = Ended {
            kind: operation.kind.name(),
            result: operation.state.name(),
        };
        self.operations.get_or_create(&labels).inc();
        if let Some(receipt) = operation.migration().and_then(|migration| migration.receipt.as_ref()) {
            if let Some(blackout) = receipt.stop_to_resume_ms {
                self.blackout.observe(millis(blackout.unsigned_abs()));
            }
            self.migration.observe(millis(receipt.request_to_running_ms));
        }
    }

    pub(crate) fn committed(&self, took: Duration, events: usize) {
        self.commit.observe(took.as_secs_f64());
        self.batch.observe(u32::try_from(events).map_or(f64::MAX, f64::from));
    }

    pub(crate) fn overloaded(&self) {
        self.refused.inc();
    }
}

fn millis(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

fn set(family: &Family<State, Gauge>, counts: impl Iterator<Item = (String, i64)>) {
    for (state, count) in counts {
        family.get_or_create(&State { state }).set(count);
    }
}

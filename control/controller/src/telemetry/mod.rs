//! What hosts and VMs use: the last look of each host in memory, a day of it in a ring on the disk. Never in the world, nor in the loop.
//!
//! ```text
//!   agents ── Telemetry ──▶ take ──▶ last looks ──▶ readings, /metrics
//!                            └──▶ rows ── queue ──▶ a thread ──▶ ring ──▶ series
//! ```
//!
//! A host speaks for the VMs that the committed world has on it, and for no others.

mod columns;
mod ring;
mod scrape;
mod series;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use model::{HostId, Telemetry, Timestamp, VmId};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::sync::mpsc;

use crate::committed::Committed;
use columns::{Kept, Row, Subject};
use ring::{Ring, Step};

pub use series::Span;

/// Looks of one host are taken no more often than this.
const APART_MIN: Duration = Duration::from_millis(500);
/// A look that is older says nothing of now.
const FRESH: Duration = Duration::from_secs(60);
/// A late look stands for at most so many spans of ten seconds.
const SPANS_MAX: u64 = 3;
/// Looks that wait for the disk; when there are more, they are not kept.
const WAITING_MAX: usize = 1024;
/// Between two complaints of a disk that does not take figures.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// What hosts told last, and the way to what they told before.
#[derive(Debug)]
pub(crate) struct Store {
    looks: Mutex<BTreeMap<HostId, Look>>,
    /// `None` where its file cannot be used: then only the last looks are known.
    ring: Option<Arc<Mutex<Ring>>>,
    queue: mpsc::Sender<Batch>,
    figures: Figures,
}

/// How this store itself does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    /// Looks and rows that were not kept.
    pub(crate) dropped: Counter,
    /// Bytes of the ring's file.
    pub(crate) bytes: Gauge,
}

/// A host's last look.
#[derive(Debug)]
struct Look {
    came: Instant,
    at: Timestamp,
    telemetry: Telemetry,
    rows: BTreeMap<Subject, Row>,
}

/// Rows of one look, on their way to the disk.
struct Batch {
    /// The span of ten seconds in which it came, and for how many it stands.
    last: u64,
    spans: u64,
    rows: Vec<Kept>,
}

impl Store {
    /// Opens the ring at `path`, of at most `bytes_max`, and starts the thread that writes it; the thread ends with the store.
    pub(crate) fn open(path: &Path, bytes_max: u64, now: Timestamp) -> Self {
        let ring = Ring::open(path, bytes_max, seconds(now))
            .inspect_err(|error| {
                tracing::error!(path = %path.display(), %error, "figures are not kept: their file cannot be used");
            })
            .ok()
            .map(|ring| Arc::new(Mutex::new(ring)));
        let (queue, batches) = mpsc::channel(WAITING_MAX);
        let figures = Figures::default();
        if let Some(ring) = ring.clone() {
            let figures = figures.clone();
            std::thread::spawn(move || keep(&ring, batches, &figures));
        }
        Self {
            looks: Mutex::default(),
            ring,
            queue,
            figures,
        }
    }

    /// How this store itself does.
    pub(crate) fn figures(&self) -> &Figures {
        &self.figures
    }

    /// Takes a look of a host in.
    pub(crate) fn take(&self, host: HostId, telemetry: Telemetry, committed: &Committed, now: Timestamp) {
        if !telemetry.is_bounded() {
            tracing::warn!(%host, "the host's figures are out of bounds: they are not taken");
            self.figures.dropped.inc();
            return;
        }
        let mut looks = self.looks();
        looks.retain(|_, look| look.came.elapsed() < FRESH);
        let before = looks.get(&host);
        if before.is_some_and(|before| before.came.elapsed() < APART_MIN) {
            tracing::debug!(%host, "a host tells its figures too often");
            self.figures.dropped.inc();
            return;
        }
        let is_here = |vm: VmId| committed.place_of(vm).is_some_and(|place| place.host == Some(host));
        let rows = columns::rows(host, &telemetry, before.map(|before| &before.telemetry), is_here);
        let last = seconds(now) / Step::Fine.seconds();
        let since = before.map_or(1, |before| {
            last.saturating_sub(seconds(before.at) / Step::Fine.seconds())
        });
        let look = Look {
            came: Instant::now(),
            at: now,
            telemetry,
            rows: rows.iter().map(|kept| (kept.subject, kept.row)).collect(),
        };
        looks.insert(host, look);
        drop(looks);
        let spans = since.clamp(1, SPANS_MAX);
        if self.queue.try_send(Batch { last, spans, rows }).is_err() && self.ring.is_some() {
            self.figures.dropped.inc();
        }
    }

    fn looks(&self) -> MutexGuard<'_, BTreeMap<HostId, Look>> {
        // Each look is put in whole.
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A time in seconds since 1970.
fn seconds(at: Timestamp) -> u64 {
    u64::try_from(at.0 / 1000).unwrap_or(0)
}

fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    // Whatever a writer that panicked left, each point says of which span it is.
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes rows as they come, until there are no more to come.
fn keep(ring: &Mutex<Ring>, mut batches: mpsc::Receiver<Batch>, figures: &Figures) {
    let mut complained: Option<Instant> = None;
    while let Some(batch) = batches.blocking_recv() {
        let mut failed = None;
        for Kept { subject, label, row } in &batch.rows {
            // Readers come in between.
            match lock(ring).write(*subject, label, batch.last, batch.spans, row) {
                Ok(true) => {}
                Ok(false) => {
                    figures.dropped.inc();
                }
                Err(error) => failed = Some(error),
            }
        }
        figures.bytes.set(i64::try_from(lock(ring).bytes()).unwrap_or(i64::MAX));
        if let Some(error) = failed {
            figures.dropped.inc();
            if complained.is_none_or(|at| at.elapsed() > COMPLAIN_EVERY) {
                tracing::warn!(%error, "figures of hosts and VMs are not kept: the disk does not take them");
                complained = Some(Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use model::{
        Actor, Name, Project, ProjectId, Role, Row, Vm, VmSpec, VmState, VmStatus,
        host::{Accelerator, Host, HostSpec, HostStatus, Link},
        id::{Generation, Revision},
        layout::{Family, Layout},
        telemetry::{CpuTimes, HostFigures, NetworkFigures, Pressure, UplinkFigures, VmFigures},
        vm::Power,
    };
    use uuid::Uuid;

    use super::{columns::Kind, *};
    use crate::metrics::Metrics;

    const HOME: HostId = HostId(Uuid::from_u128(1));
    const OTHER: HostId = HostId(Uuid::from_u128(2));
    const WEB: VmId = VmId(Uuid::from_u128(3));
    const OURS: ProjectId = ProjectId(Uuid::from_u128(4));
    const THEIRS: ProjectId = ProjectId(Uuid::from_u128(5));
    const NOW: Timestamp = Timestamp(1_790_000_005_000);

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn host(id: HostId, text: &str) -> Row {
        let status = HostStatus {
            link: Link::Up,
            since: NOW,
            facts: None,
        };
        Row::Host(Box::new(Host {
            id,
            name: name(text),
            spec: HostSpec::default(),
            status,
            joined_at: NOW,
        }))
    }

    fn project(id: ProjectId, text: &str) -> Row {
        Row::Project(Project {
            id,
            name: name(text),
            quota: model::access::Quota::default(),
            used: model::access::Usage::default(),
        })
    }

    /// A VM of our project that runs on [`HOME`].
    // tidy: long because a row has many columns.
    fn web() -> Row {
        Row::Vm(Box::new(Vm {
            id: WEB,
            project: OURS,
            name: name("web1"),
            spec: VmSpec {
                template: Uuid::nil().into(),
                vcpus: 2,
                memory_mib: 512,
                family: Family::Q35,
                power: Power::On,
            },
            revision: Revision(1),
            layout: Layout {
                version: 1,
                family: Family::Q35,
                machine: "pc-q35-7.2".to_owned(),
                accelerator: Accelerator::Tcg,
                cpu: "max".to_owned(),
                vcpus: 2,
                memory_mib: 512,
                devices: Vec::new(),
                seed: None,
            },
            ports: Vec::new(),
            volumes: Vec::new(),
            status: VmStatus {
                state: VmState::Active,
                since: NOW,
                reason: None,
                host: Some(HOME),
                generation: Generation(1),
                highest: Generation(1),
                ordered: Revision(1),
                observed: Revision(1),
                moving: None,
                cleared: BTreeSet::new(),
            },
            operation: None,
            created_at: NOW,
        }))
    }

    fn committed(figures: &Figures) -> Committed {
        let committed = Committed::new(Arc::new(Metrics::new(figures)));
        let rows = [
            host(HOME, "h1"),
            host(OTHER, "h2"),
            project(OURS, "ours"),
            project(THEIRS, "theirs"),
            web(),
        ];
        committed.load(&rows);
        committed
    }

    fn look(clock_ms: u64, cpu_ms: u64) -> Telemetry {
        let uplink = UplinkFigures {
            name: "eth0".to_owned(),
            network: NetworkFigures::default(),
        };
        let host = HostFigures {
            cpus: 4,
            cpu: CpuTimes {
                user_ms: cpu_ms,
                ..CpuTimes::default()
            },
            uplinks: vec![uplink],
            ..HostFigures::default()
        };
        let web = VmFigures {
            vm: WEB,
            started_ticks: 9,
            cpu_ms,
            cpu_wait_ms: Some(1),
            memory_bytes: 300 << 20,
            disk: None,
            network: NetworkFigures::default(),
            pressure: Pressure::default(),
        };
        Telemetry {
            clock_ms,
            host,
            vms: vec![web],
        }
    }

    fn actor(project: ProjectId, role: Role) -> Actor {
        Actor {
            subject: "somebody".to_owned(),
            project,
            role,
            via: model::Via::default(),
        }
    }

    /// As if the last look of a host had come ten seconds ago.
    fn ten_seconds_pass(store: &Store, host: HostId) {
        let mut looks = store.looks();
        let look = looks.get_mut(&host).unwrap();
        look.came = look.came.checked_sub(Duration::from_secs(10)).unwrap();
    }

    fn scraped(store: &Store, committed: &Committed, actor: &Actor) -> String {
        let mut text = String::new();
        store.scrape(actor, committed, &mut text);
        text
    }

    #[test]
    fn a_scrape_tells_each_what_they_may_see_and_a_host_speaks_for_its_own_vms_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("ring"), 1 << 30, NOW);
        let committed = committed(store.figures());
        store.take(HOME, look(1000, 1500), &committed, NOW);
        store.take(OTHER, look(1000, 77_000), &committed, NOW);
        let all = scraped(&store, &committed, &actor(THEIRS, Role::CloudAdmin));
        let sample = |name: &str, host: &str, value: &str| {
            format!("{name}{{vm=\"web1\",vm_id=\"{WEB}\",host=\"{host}\",project=\"ours\"}} {value}\n")
        };
        assert!(
            all.contains(&sample("godwit_vm_cpu_seconds_total", "h1", "1.5")),
            "{all}"
        );
        assert!(
            all.contains(&sample("godwit_vm_memory_bytes", "h1", "314572800.0")),
            "{all}"
        );
        assert!(!all.contains("77.0\"") && !all.contains(&sample("godwit_vm_cpu_seconds_total", "h2", "77.0")));
        assert!(
            all.contains("godwit_host_cpu_seconds_total{host=\"h2\",mode=\"user\"} 77.0\n"),
            "{all}"
        );
        assert!(all.contains("# TYPE godwit_host_pressure_seconds counter\n"), "{all}");
        assert!(
            !all.contains("godwit_host_pressure_seconds_total{"),
            "what is not known is not told as 0"
        );
        let ours = scraped(&store, &committed, &actor(OURS, Role::Viewer));
        assert!(ours.contains("vm=\"web1\"") && !ours.contains("host_cpus{"), "{ours}");
        let theirs = scraped(&store, &committed, &actor(THEIRS, Role::ProjectAdmin));
        assert!(!theirs.contains("web1") && !theirs.contains("h1"), "{theirs}");
    }

    #[test]
    fn what_was_kept_is_read_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let later = NOW.after(model::Millis::seconds(10));
        {
            let store = Store::open(&path, 1 << 30, NOW);
            let committed = committed(store.figures());
            store.take(HOME, look(1000, 1500), &committed, NOW);
            store.take(HOME, look(1100, 1600), &committed, NOW);
            assert_eq!(store.figures().dropped.get(), 1, "too soon");
            ten_seconds_pass(&store, HOME);
            store.take(HOME, look(11_000, 6500), &committed, later);
            assert_eq!(store.last(HOME, Subject::vm(WEB)).unwrap().1[0], 0.5);
            assert!(store.last(OTHER, Subject::vm(WEB)).is_none());
            let until = Instant::now() + Duration::from_secs(30);
            while store.history(Subject::vm(WEB), 1, later)[0][0].is_nan() {
                assert!(Instant::now() < until, "the rows do not reach the disk");
                std::thread::yield_now();
            }
        }
        let store = Store::open(&path, 1 << 30, later);
        let rows = store.history(Subject::vm(WEB), 2, later);
        assert_eq!((rows.len(), rows[1][0], rows[0][0].is_nan()), (2, 0.5, true));
        assert_eq!(rows[0][2], (300 << 20) as f32);
        let uplinks = store.parts_of(Kind::Uplink, HOME);
        assert_eq!(
            uplinks.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>(),
            ["eth0"]
        );
        assert!(
            store.last(HOME, Subject::vm(WEB)).is_none(),
            "what is old says nothing of now"
        );
    }

    #[test]
    fn a_look_out_of_bounds_or_a_file_that_cannot_be_used_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 1 << 30, NOW);
        let committed = committed(store.figures());
        let mut huge = look(1000, 1);
        huge.host.uplinks[0].name = "\u{1b}[2J".to_owned();
        store.take(HOME, huge, &committed, NOW);
        assert!(store.last(HOME, Subject::host(HOME)).is_none());
        store.take(HOME, look(1000, 1), &committed, NOW);
        assert!(store.last(HOME, Subject::host(HOME)).is_some());
        assert!(store.history(Subject::host(HOME), 5, NOW).is_empty());
    }
}

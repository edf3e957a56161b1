//! What this host and its VMs use, told to the controller every few seconds.
//!
//! ```text
//!   /proc, /sys ──┐
//!   netlink ──────┼─▶ Sampler::look ──▶ Telemetry ──▶ the session, if it has room: else it is lost, and nobody misses it
//!   QMP, briefly ─┘
//! ```
//!
//! Nothing waits for this. Counters are told as the kernel has them; what it does not tell is told as not known.

mod kernel;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use model::{
    PoolId, PortId, Telemetry, VmId,
    telemetry::{DeviceFigures, HostFigures, NetworkFigures, PoolFigures, Pressure, UplinkFigures, VmFigures},
};
use network::Traffic;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{MissedTickBehavior, interval};

use crate::{facts, shared::Shared};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);
/// How long a pool's file system may take to say on which device it lies.
const POOL_ANSWERS_MAX: Duration = Duration::from_secs(2);
/// QEMUs asked at once.
const ASKED_AT_ONCE: usize = 16;
/// Threads of a process whose waiting is counted.
const THREADS_MAX: usize = 512;
/// Where the unified hierarchy of control groups may be.
const GROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A VM's process, as far as it is watched.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    pub(crate) handle: qemu::Handle,
    pub(crate) ports: Vec<PortId>,
}

/// Looks again and again, and tells.
pub(crate) async fn keep_telling(shared: Arc<Shared>) {
    let mut sampler = Sampler::default();
    let mut every = interval(EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        // Nobody would hear.
        if !shared.is_connected() {
            continue;
        }
        if let Some(telemetry) = sampler.look(&shared).await {
            shared.tell(telemetry);
        }
    }
}

/// What is remembered from look to look.
#[derive(Debug, Default)]
struct Sampler {
    /// The `stat` file of the device below each pool; `None` where there is none.
    devices: BTreeMap<PoolId, Option<PathBuf>>,
    waits: BTreeMap<VmId, Waits>,
}

/// For how long a process's threads have waited for a CPU. Threads that end take their counts along: what they had stays counted.
#[derive(Clone, Debug, Default)]
struct Waits {
    started_ticks: u64,
    total_ns: u64,
    threads: BTreeMap<u32, u64>,
}

impl Sampler {
    async fn look(&mut self, shared: &Arc<Shared>) -> Option<Telemetry> {
        let watched = shared.watched();
        let disks = stream::iter(
            watched
                .iter()
                .map(|(vm, one)| async move { (*vm, one.handle.disk_figures().await) }),
        )
        .buffer_unordered(ASKED_AT_ONCE)
        .collect::<BTreeMap<_, _>>()
        .await;
        let pools = self.pools(shared).await;
        let mut waits = std::mem::take(&mut self.waits);
        let shared = Arc::clone(shared);
        let looked = tokio::task::spawn_blocking(move || {
            let traffic = traffic(&shared);
            let mut host = host_figures(&traffic)?;
            host.pools = pools;
            waits.retain(|vm, _| watched.contains_key(vm));
            let own = own_group();
            let figures = watched.iter().take(Telemetry::VMS_MAX).filter_map(|(vm, one)| {
                let mut figures = vm_figures(*vm, one, &traffic, own.as_deref(), waits.entry(*vm).or_default())?;
                figures.disk = disks.get(vm).copied().flatten();
                Some(figures)
            });
            let vms = figures.collect();
            let telemetry = Telemetry {
                clock_ms: boot_clock_ms(),
                host,
                vms,
            };
            Ok::<_, io::Error>((telemetry, waits))
        });
        match looked.await {
            Ok(Ok((telemetry, waits))) => {
                self.waits = waits;
                Some(telemetry)
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "this host's figures cannot be read");
                None
            }
            Err(error) => {
                tracing::error!(%error, "a look at this host's figures broke off");
                None
            }
        }
    }

    async fn pools(&mut self, shared: &Shared) -> Vec<PoolFigures> {
        let mut figures = vec![];
        for facts in facts::pools(shared).await.into_iter().take(Telemetry::PARTS_MAX) {
            let device = match self.devices.get(&facts.id) {
                Some(known) => known.clone(),
                None if facts.silent_since.is_some() => None,
                None => self.find_device(shared, facts.id).await,
            };
            figures.push(PoolFigures {
                pool: facts.id,
                name: facts.name,
                capacity_bytes: facts.capacity_bytes,
                free_bytes: facts.free_bytes,
                device: device.as_deref().and_then(device_figures),
            });
        }
        figures
    }

    /// The device below a pool. Asked once for each pool: a file system does not change its device.
    async fn find_device(&mut self, shared: &Shared, id: PoolId) -> Option<PathBuf> {
        let pool = shared.pool(id)?;
        let path = pool.pool.path().to_owned();
        let found = pool.room.run(move || device_of(&path), POOL_ANSWERS_MAX).await.ok()?;
        self.devices.insert(id, found.clone());
        found
    }
}

/// The `stat` file of the block device on which a path lies; `None` for file systems that have none of this host (NFS, overlay, tmpfs).
fn device_of(path: &Path) -> Option<PathBuf> {
    let device = rustix::fs::stat(path).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"));
    stat.exists().then_some(stat)
}

fn device_figures(stat: &Path) -> Option<DeviceFigures> {
    kernel::device(&fs::read_to_string(stat).ok()?)
}

fn traffic(shared: &Shared) -> Traffic {
    let uplinks: Vec<_> = shared.config.uplink.iter().cloned().collect();
    shared.network.traffic(&uplinks).unwrap_or_else(|error| {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "the links' counters cannot be read"
        );
        Traffic::default()
    })
}

fn host_figures(traffic: &Traffic) -> io::Result<HostFigures> {
    let strange = |path: &str| io::Error::other(format!("{path} has another form than documented"));
    let ticks = rustix::param::clock_ticks_per_second();
    let cpu = kernel::cpu_times(&fs::read_to_string("/proc/stat")?, ticks).ok_or_else(|| strange("/proc/stat"))?;
    let memory = kernel::memory(&fs::read_to_string("/proc/meminfo")?);
    let (memory_bytes, memory_available_bytes) = memory.ok_or_else(|| strange("/proc/meminfo"))?;
    let uplinks = traffic.uplinks.iter().take(Telemetry::PARTS_MAX);
    Ok(HostFigures {
        cpus: facts::cpus(),
        cpu,
        memory_bytes,
        memory_available_bytes,
        pressure: pressure(Path::new("/proc/pressure"), ""),
        pools: vec![],
        uplinks: uplinks
            .map(|(name, counters)| UplinkFigures {
                name: name.clone(),
                network: NetworkFigures {
                    received_bytes: counters.received_bytes,
                    sent_bytes: counters.sent_bytes,
                    received_dropped: counters.received_dropped,
                    sent_dropped: counters.sent_dropped,
                },
            })
            .collect(),
    })
}

/// The pressure files of a directory: `cpu`, `memory` and `io`, each with this suffix.
fn pressure(directory: &Path, suffix: &str) -> Pressure {
    let stall = |resource: &str| {
        let text = fs::read_to_string(directory.join(format!("{resource}{suffix}"))).ok()?;
        kernel::stall(&text)
    };
    Pressure {
        cpu: stall("cpu"),
        memory: stall("memory"),
        io: stall("io"),
    }
}

/// This agent's own control group: what is in it has none of its own.
fn own_group() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    kernel::group(&text).map(str::to_owned)
}

/// `None` when the process is gone.
fn vm_figures(
    vm: VmId,
    watched: &Watched,
    traffic: &Traffic,
    own: Option<&str>,
    waits: &mut Waits,
) -> Option<VmFigures> {
    let process = watched.handle.process();
    let directory = PathBuf::from(format!("/proc/{}", process.pid));
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let (cpu_ticks, started_ticks) = kernel::process(&read("stat")?)?;
    // Its number may be another's by now.
    if started_ticks != process.start_ticks {
        return None;
    }
    let pages = kernel::resident_pages(&read("statm")?)?;
    let mut network = NetworkFigures::default();
    for counters in watched.ports.iter().filter_map(|port| traffic.ports.get(port)) {
        network.received_bytes += counters.received_bytes;
        network.sent_bytes += counters.sent_bytes;
        network.received_dropped += counters.received_dropped;
        network.sent_dropped += counters.sent_dropped;
    }
    let groups = read("cgroup");
    let group = groups.as_deref().and_then(kernel::group);
    let group = group.filter(|group| *group != "/" && Some(*group) != own);
    Some(VmFigures {
        vm,
        started_ticks,
        cpu_ms: kernel::ticks_to_ms(cpu_ticks, rustix::param::clock_ticks_per_second()),
        cpu_wait_ms: waits.look(&directory, started_ticks),
        memory_bytes: pages.saturating_mul(rustix::param::page_size() as u64),
        disk: None,
        network,
        pressure: group.map(group_pressure).unwrap_or_default(),
    })
}

fn group_pressure(group: &str) -> Pressure {
    let directory = |root: &&str| Path::new(root).join(group.trim_start_matches('/'));
    let mut directories = GROUPS.iter().map(directory);
    directories
        .find(|directory| directory.join("cpu.pressure").exists())
        .map_or_else(Pressure::default, |directory| pressure(&directory, ".pressure"))
}

impl Waits {
    /// Looks at all threads of the process in `directory`; for how long they have waited in all, ms. `None` where the kernel does not
    /// count it.
    fn look(&mut self, directory: &Path, started_ticks: u64) -> Option<u64> {
        if self.started_ticks != started_ticks {
            *self = Self {
                started_ticks,
                ..Self::default()
            };
        }
        let threads = fs::read_dir(directory.join("task")).ok()?.flatten().take(THREADS_MAX);
        let mut seen = BTreeSet::new();
        for thread in threads {
            let Some(id) = thread.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let text = fs::read_to_string(thread.path().join("schedstat"));
            let Some(now) = text.ok().and_then(|text| kernel::run_delay_ns(&text)) else {
                continue;
            };
            seen.insert(id);
            self.count(id, now);
        }
        self.threads.retain(|id, _| seen.contains(id));
        (!seen.is_empty()).then_some(self.total_ns / 1_000_000)
    }

    fn count(&mut self, thread: u32, now_ns: u64) {
        let before = self.threads.insert(thread, now_ns).unwrap_or(0);
        // A number that came to be another thread's begins anew.
        let more = if now_ns >= before { now_ns - before } else { now_ns };
        self.total_ns = self.total_ns.saturating_add(more);
    }
}

/// Time since boot, sleep included, ms.
fn boot_clock_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (
        u64::try_from(now.tv_sec).unwrap_or(0),
        u64::try_from(now.tv_nsec).unwrap_or(0),
    );
    seconds * 1000 + nanos / 1_000_000
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use super::*;
    use crate::fixture::Cell;

    #[test]
    fn a_control_groups_pressure_is_read_and_an_absent_file_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let some = "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\n";
        fs::write(dir.path().join("memory.pressure"), some).unwrap();
        let read = pressure(dir.path(), ".pressure");
        assert_eq!(read.memory.map(|stall| stall.some_us), Some(9));
        assert_eq!((read.cpu, read.io), (None, None));
    }

    #[test]
    fn what_a_thread_waited_stays_counted_when_it_ends_or_its_number_is_anothers() {
        let mut waits = Waits::default();
        waits.count(1, 5_000_000);
        waits.count(2, 1_000_000);
        waits.count(1, 7_000_000);
        waits.threads.remove(&2);
        waits.count(2, 3_000_000);
        waits.count(1, 1_000_000);
        assert_eq!(waits.total_ns, 12_000_000);
    }

    #[test]
    fn the_threads_of_this_process_are_found_and_another_process_begins_anew() {
        let mut waits = Waits::default();
        let first = waits.look(Path::new("/proc/self"), 1);
        assert!(first.is_some() && !waits.threads.is_empty());
        waits.total_ns = u64::MAX / 2;
        assert!(waits.look(Path::new("/proc/self"), 2).unwrap() < u64::MAX / 2_000_000);
        assert_eq!(waits.look(Path::new("/proc/0"), 2), None);
    }

    #[tokio::test]
    async fn a_look_tells_of_this_host() {
        let shared = Cell::new().host(1).await;
        let mut sampler = Sampler::default();
        let first = sampler.look(&shared).await.unwrap();
        let second = sampler.look(&shared).await.unwrap();
        assert!(first.is_bounded() && second.clock_ms >= first.clock_ms);
        assert!(second.host.cpu.busy_ms() >= first.host.cpu.busy_ms());
        assert!(first.host.memory_bytes > first.host.memory_available_bytes);
        assert_eq!(
            first.host.pressure.cpu.is_some(),
            Path::new("/proc/pressure/cpu").exists()
        );
        assert!(first.vms.is_empty());
    }
}

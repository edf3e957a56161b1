//! What is kept of a look: a row of levels and rates for each thing, its columns in a fixed order.

use model::{
    HostId, PoolId, Telemetry, VmId,
    telemetry::{DiskFigures, HostFigures, NetworkFigures, PoolFigures, Stall, VmFigures},
};

/// Columns of a row. A kind of thing may use fewer; it never uses one for something else than before, for files keep them.
pub(super) const COLUMNS: usize = 12;

/// Levels and rates of one thing; not a number where nothing was measured.
pub(super) type Row = [f32; COLUMNS];

/// A row in which nothing was measured.
pub(super) const NOTHING: Row = [f32::NAN; COLUMNS];

/// Kinds of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Vm,
    Host,
    Pool,
    Uplink,
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Host => "host",
            Self::Pool => "pool",
            Self::Uplink => "uplink",
        }
    }

    /// The names of its columns, each ending in its unit. `cores`: CPU seconds a second. `ratio`: of the time, 0 to 1.
    pub(super) const fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Vm => &[
                "cpu_cores",
                "cpu_wait_cores",
                "memory_bytes",
                "disk_read_bytes_per_s",
                "disk_written_bytes_per_s",
                "disk_reads_per_s",
                "disk_writes_per_s",
                "network_received_bytes_per_s",
                "network_sent_bytes_per_s",
                "pressure_cpu_ratio",
                "pressure_memory_ratio",
                "pressure_io_ratio",
            ],
            Self::Host => &[
                "cpu_cores",
                "cpu_iowait_cores",
                "cpu_steal_cores",
                "memory_bytes",
                "disk_read_bytes_per_s",
                "disk_written_bytes_per_s",
                "network_received_bytes_per_s",
                "network_sent_bytes_per_s",
                "pressure_cpu_ratio",
                "pressure_memory_ratio",
                "pressure_io_ratio",
                "pressure_memory_full_ratio",
            ],
            Self::Pool => &[
                "capacity_bytes",
                "free_bytes",
                "disk_read_bytes_per_s",
                "disk_written_bytes_per_s",
                "disk_reads_per_s",
                "disk_writes_per_s",
                "busy_ratio",
            ],
            Self::Uplink => &[
                "network_received_bytes_per_s",
                "network_sent_bytes_per_s",
                "received_dropped_frames_per_s",
                "sent_dropped_frames_per_s",
            ],
        }
    }
}

/// One thing, or a part of a host: the key under which its rows are kept. A kind, the id of the VM or host, and what tells parts apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Subject(pub(super) [u8; Subject::BYTES]);

impl Subject {
    pub(super) const BYTES: usize = 33;

    fn new(kind: Kind, of: uuid::Uuid, part: &[u8]) -> Self {
        let mut key = [0; Self::BYTES];
        key[0] = match kind {
            Kind::Vm => 1,
            Kind::Host => 2,
            Kind::Pool => 3,
            Kind::Uplink => 4,
        };
        key[1..17].copy_from_slice(of.as_bytes());
        key[17..].iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        Self(key)
    }

    pub(super) fn vm(vm: VmId) -> Self {
        Self::new(Kind::Vm, vm.0, &[])
    }

    pub(super) fn host(host: HostId) -> Self {
        Self::new(Kind::Host, host.0, &[])
    }

    fn pool(host: HostId, pool: PoolId) -> Self {
        Self::new(Kind::Pool, host.0, pool.0.as_bytes())
    }

    fn uplink(host: HostId, name: &str) -> Self {
        Self::new(Kind::Uplink, host.0, name.as_bytes())
    }

    /// The first and the last key that parts of this kind of a host can have.
    pub(super) fn parts(kind: Kind, host: HostId) -> (Self, Self) {
        (Self::new(kind, host.0, &[]), Self::new(kind, host.0, &[u8::MAX; 16]))
    }
}

/// What is kept of one thing at one time.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) subject: Subject,
    /// What people call it, where they do not find it by its id.
    pub(super) label: String,
    pub(super) row: Row,
}

/// The rows of a host's look, for `vms` of its VMs; `before` is its look before this one.
pub(super) fn rows(
    host: HostId,
    now: &Telemetry,
    before: Option<&Telemetry>,
    is_here: impl Fn(VmId) -> bool,
) -> Vec<Kept> {
    // A host that was started anew counts anew.
    let before = before.filter(|before| before.clock_ms < now.clock_ms);
    let seconds = before.map_or(f64::NAN, |before| millis(now.clock_ms - before.clock_ms));
    let kept = |subject, label: &str, row| Kept {
        subject,
        label: label.to_owned(),
        row,
    };
    let host_before = before.map(|before| &before.host);
    let mut rows = vec![kept(Subject::host(host), "", host_row(&now.host, host_before, seconds))];
    for pool in &now.host.pools {
        let last = host_before.and_then(|last| last.pools.iter().find(|last| last.pool == pool.pool));
        let row = pool_row(pool, last, seconds);
        rows.push(kept(Subject::pool(host, pool.pool), pool.name.as_str(), row));
    }
    for uplink in &now.host.uplinks {
        let last = host_before.and_then(|last| last.uplinks.iter().find(|last| last.name == uplink.name));
        let row = uplink_row(&uplink.network, last.map(|last| &last.network), seconds);
        rows.push(kept(Subject::uplink(host, &uplink.name), &uplink.name, row));
    }
    let last: std::collections::BTreeMap<_, _> = before
        .iter()
        .flat_map(|before| &before.vms)
        .map(|vm| (vm.vm, vm))
        .collect();
    for vm in now.vms.iter().filter(|vm| is_here(vm.vm)) {
        let last = last.get(&vm.vm).filter(|last| last.started_ticks == vm.started_ticks);
        rows.push(kept(Subject::vm(vm.vm), "", vm_row(vm, last.copied(), seconds)));
    }
    rows
}

fn millis(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}

/// By how much a counter grew a second, in units of `unit`. What counts backwards was counted anew: the rate is not known.
fn rate(now: Option<u64>, before: Option<u64>, seconds: f64, unit: f64) -> f32 {
    match (now, before) {
        (Some(now), Some(before)) if now >= before && seconds > 0.0 => ((now - before) as f64 * unit / seconds) as f32,
        _ => f32::NAN,
    }
}

const MS: f64 = 1e-3;
const US: f64 = 1e-6;

fn host_row(now: &HostFigures, before: Option<&HostFigures>, seconds: f64) -> Row {
    let of = |read: fn(&HostFigures) -> Option<u64>, unit| rate(read(now), before.and_then(read), seconds, unit);
    let mut row = NOTHING;
    row[0] = of(|host| Some(host.cpu.busy_ms()), MS);
    row[1] = of(|host| Some(host.cpu.iowait_ms), MS);
    row[2] = of(|host| Some(host.cpu.steal_ms), MS);
    row[3] = now.memory_bytes.saturating_sub(now.memory_available_bytes) as f32;
    // Pools on one device are counted once.
    row[4] = of(|host| devices(host, |disk| disk.read_bytes), 1.0);
    row[5] = of(|host| devices(host, |disk| disk.written_bytes), 1.0);
    row[6] = of(|host| links(host, |link| link.received_bytes), 1.0);
    row[7] = of(|host| links(host, |link| link.sent_bytes), 1.0);
    row[8] = of(|host| some(host.pressure.cpu), US);
    row[9] = of(|host| some(host.pressure.memory), US);
    row[10] = of(|host| some(host.pressure.io), US);
    row[11] = of(|host| host.pressure.memory.and_then(|stall| stall.full_us), US);
    row
}

fn some(stall: Option<Stall>) -> Option<u64> {
    stall.map(|stall| stall.some_us)
}

fn devices(host: &HostFigures, read: fn(&DiskFigures) -> u64) -> Option<u64> {
    let mut seen: Vec<&DiskFigures> = vec![];
    for device in host.pools.iter().filter_map(|pool| pool.device.as_ref()) {
        // Two devices that ever did exactly the same do not matter.
        if !seen.contains(&&device.disk) {
            seen.push(&device.disk);
        }
    }
    let sum = seen.iter().fold(0, |sum: u64, disk| sum.saturating_add(read(disk)));
    (!seen.is_empty()).then_some(sum)
}

fn links(host: &HostFigures, read: fn(&NetworkFigures) -> u64) -> Option<u64> {
    let sum = host
        .uplinks
        .iter()
        .fold(0, |sum: u64, uplink| sum.saturating_add(read(&uplink.network)));
    (!host.uplinks.is_empty()).then_some(sum)
}

fn pool_row(now: &PoolFigures, before: Option<&PoolFigures>, seconds: f64) -> Row {
    let disk = |pool: &PoolFigures, read: fn(&DiskFigures) -> u64| pool.device.map(|device| read(&device.disk));
    let of =
        |read: fn(&DiskFigures) -> u64| rate(disk(now, read), before.and_then(|last| disk(last, read)), seconds, 1.0);
    let busy = |pool: &PoolFigures| pool.device.map(|device| device.busy_ms);
    let mut row = NOTHING;
    if now.capacity_bytes > 0 {
        row[0] = now.capacity_bytes as f32;
        row[1] = now.free_bytes as f32;
    }
    row[2] = of(|disk| disk.read_bytes);
    row[3] = of(|disk| disk.written_bytes);
    row[4] = of(|disk| disk.reads);
    row[5] = of(|disk| disk.writes);
    row[6] = rate(busy(now), before.and_then(busy), seconds, MS);
    row
}

fn uplink_row(now: &NetworkFigures, before: Option<&NetworkFigures>, seconds: f64) -> Row {
    let of = |read: fn(&NetworkFigures) -> u64| rate(Some(read(now)), before.map(read), seconds, 1.0);
    let mut row = NOTHING;
    row[0] = of(|link| link.received_bytes);
    row[1] = of(|link| link.sent_bytes);
    row[2] = of(|link| link.received_dropped);
    row[3] = of(|link| link.sent_dropped);
    row
}

fn vm_row(now: &VmFigures, before: Option<&VmFigures>, seconds: f64) -> Row {
    let of = |read: fn(&VmFigures) -> Option<u64>, unit| rate(read(now), before.and_then(read), seconds, unit);
    let mut row = NOTHING;
    row[0] = of(|vm| Some(vm.cpu_ms), MS);
    row[1] = of(|vm| vm.cpu_wait_ms, MS);
    row[2] = now.memory_bytes as f32;
    row[3] = of(|vm| vm.disk.map(|disk| disk.read_bytes), 1.0);
    row[4] = of(|vm| vm.disk.map(|disk| disk.written_bytes), 1.0);
    row[5] = of(|vm| vm.disk.map(|disk| disk.reads), 1.0);
    row[6] = of(|vm| vm.disk.map(|disk| disk.writes), 1.0);
    row[7] = of(|vm| Some(vm.network.received_bytes), 1.0);
    row[8] = of(|vm| Some(vm.network.sent_bytes), 1.0);
    row[9] = of(|vm| some(vm.pressure.cpu), US);
    row[10] = of(|vm| some(vm.pressure.memory), US);
    row[11] = of(|vm| some(vm.pressure.io), US);
    row
}

#[cfg(test)]
mod tests {
    use model::telemetry::{CpuTimes, Pressure};
    use uuid::Uuid;

    use super::*;

    const HOST: HostId = HostId(Uuid::from_u128(1));
    const VM: VmId = VmId(Uuid::from_u128(2));

    fn look(clock_ms: u64, busy_ms: u64, cpu_ms: u64, started_ticks: u64) -> Telemetry {
        let vm = VmFigures {
            vm: VM,
            started_ticks,
            cpu_ms,
            cpu_wait_ms: None,
            memory_bytes: 64 << 20,
            disk: None,
            network: NetworkFigures::default(),
            pressure: Pressure::default(),
        };
        let host = HostFigures {
            cpus: 4,
            cpu: CpuTimes {
                user_ms: busy_ms,
                ..CpuTimes::default()
            },
            memory_bytes: 10 << 30,
            memory_available_bytes: 4 << 30,
            ..HostFigures::default()
        };
        Telemetry {
            clock_ms,
            host,
            vms: vec![vm],
        }
    }

    fn of(rows: &[Kept], subject: Subject) -> Row {
        rows.iter().find(|kept| kept.subject == subject).unwrap().row
    }

    #[test]
    fn rates_are_made_of_two_looks_by_the_hosts_own_clock() {
        let (first, second) = (look(1000, 500, 200, 9), look(11_000, 25_500, 7_700, 9));
        let rows = rows(HOST, &second, Some(&first), |_| true);
        let (host, vm) = (of(&rows, Subject::host(HOST)), of(&rows, Subject::vm(VM)));
        assert_eq!((host[0], host[3]), (2.5, (6u64 << 30) as f32));
        assert_eq!((vm[0], vm[2]), (0.75, (64 << 20) as f32));
        assert!(
            vm[1].is_nan() && vm[3].is_nan() && host[8].is_nan(),
            "what is not told is not 0"
        );
    }

    #[test]
    fn what_counts_anew_has_no_rate_until_it_was_seen_twice() {
        let first = look(1000, 500, 900, 9);
        for second in [
            look(11_000, 100, 100, 9),
            look(11_000, 100, 1000, 10),
            look(500, 600, 1000, 9),
        ] {
            let rows = rows(HOST, &second, Some(&first), |_| true);
            assert!(of(&rows, Subject::vm(VM))[0].is_nan(), "{second:?}");
            assert!(of(&rows, Subject::host(HOST))[0].is_nan(), "{second:?}");
        }
        let rows = rows(HOST, &first, None, |_| true);
        assert!(of(&rows, Subject::vm(VM))[0].is_nan());
    }

    #[test]
    fn a_vm_that_is_elsewhere_is_not_kept_whatever_a_host_says() {
        let rows = rows(HOST, &look(1, 1, 1, 1), None, |_| false);
        assert!(rows.iter().all(|kept| kept.subject != Subject::vm(VM)));
    }

    #[test]
    fn every_kind_fits_a_row_and_parts_lie_between_their_bounds() {
        for kind in [Kind::Vm, Kind::Host, Kind::Pool, Kind::Uplink] {
            assert!(kind.columns().len() <= COLUMNS);
        }
        let (first, last) = Subject::parts(Kind::Uplink, HOST);
        let one = Subject::uplink(HOST, "eth0");
        assert!(first < one && one < last);
        let other = Subject::uplink(HostId(Uuid::from_u128(3)), "eth0");
        assert!(other < first || other > last);
    }
}

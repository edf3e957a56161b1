//! What the kernel tells in `/proc` and `/sys`, read: each function takes a file's text, and nothing else.

use model::telemetry::{CpuTimes, DeviceFigures, DiskFigures, Stall};

/// Sectors of the block layer, whatever the device's are (Documentation/block/stat.rst).
const SECTOR_BYTES: u64 = 512;

/// The first line of `/proc/stat`: all CPUs together (proc_stat(5)). `ticks` clock ticks make a second.
pub(super) fn cpu_times(stat: &str, ticks: u64) -> Option<CpuTimes> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests' time is in the first two.
    let ms = |n: usize| fields.get(n).map_or(0, |count| ticks_to_ms(*count, ticks));
    (fields.len() >= 4).then(|| CpuTimes {
        user_ms: ms(0) + ms(1),
        system_ms: ms(2) + ms(5) + ms(6),
        idle_ms: ms(3),
        iowait_ms: ms(4),
        steal_ms: ms(7),
    })
}

pub(super) fn ticks_to_ms(count: u64, ticks: u64) -> u64 {
    u64::try_from(u128::from(count) * 1000 / u128::from(ticks.max(1))).unwrap_or(u64::MAX)
}

/// `/proc/meminfo`: bytes in all, and bytes that new programs could have.
pub(super) fn memory(meminfo: &str) -> Option<(u64, u64)> {
    let kib = |key: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some((
        kib("MemTotal:")?.checked_mul(1024)?,
        kib("MemAvailable:")?.checked_mul(1024)?,
    ))
}

/// One of `/proc/pressure/*`, or a control group's `*.pressure`.
pub(super) fn stall(text: &str) -> Option<Stall> {
    let total = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        line.split_whitespace()
            .find_map(|word| word.strip_prefix("total=")?.parse().ok())
    };
    Some(Stall {
        some_us: total("some ")?,
        full_us: total("full "),
    })
}

/// A block device's `stat` in `/sys`.
pub(super) fn device(stat: &str) -> Option<DeviceFigures> {
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let field = |n: usize| fields.get(n).copied();
    Some(DeviceFigures {
        disk: DiskFigures {
            reads: field(0)?,
            read_bytes: field(2)?.checked_mul(SECTOR_BYTES)?,
            writes: field(4)?,
            written_bytes: field(6)?.checked_mul(SECTOR_BYTES)?,
        },
        busy_ms: field(9)?,
    })
}

/// `/proc/PID/stat`: CPU time in ticks, and the ticks from boot to the process's start. The second field may hold spaces and parentheses.
pub(super) fn process(stat: &str) -> Option<(u64, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let field = |n: usize| fields.get(n)?.parse::<u64>().ok();
    // Fields 14, 15 and 22, of which the third is the first here.
    Some((field(11)?.checked_add(field(12)?)?, field(19)?))
}

/// `/proc/PID/statm`: pages in memory.
pub(super) fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_whitespace().nth(1)?.parse().ok()
}

/// A thread's `schedstat`: for how long it was ready and had no CPU, ns (Documentation/scheduler/sched-stats.rst).
pub(super) fn run_delay_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

/// `/proc/PID/cgroup`: the path of its group in the unified hierarchy.
pub(super) fn group(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use super::*;

    #[test]
    fn real_files_are_read() {
        let stat = "cpu  100 20 30 4000 50 6 7 8 90 0\ncpu0 1 1 1 1\nintr 5\n";
        let times = cpu_times(stat, 100).unwrap();
        let read = (
            times.user_ms,
            times.system_ms,
            times.idle_ms,
            times.iowait_ms,
            times.steal_ms,
        );
        assert_eq!(read, (1200, 430, 40_000, 500, 80));
        let meminfo = "MemTotal:        8000 kB\nMemFree:  10 kB\nMemAvailable:    6000 kB\n";
        assert_eq!(memory(meminfo), Some((8_192_000, 6_144_000)));
        let psi =
            "some avg10=0.00 avg60=1.00 avg300=0.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=67\n";
        assert_eq!(
            stall(psi),
            Some(Stall {
                some_us: 12_345,
                full_us: Some(67)
            })
        );
        let old = "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        assert_eq!(
            stall(old),
            Some(Stall {
                some_us: 5,
                full_us: None
            })
        );
        let disk = "  10  1  16  5  20  2  32  7  0  99  12 0 0 0 0\n";
        let figures = device(disk).unwrap();
        assert_eq!((figures.disk.reads, figures.disk.read_bytes), (10, 8192));
        assert_eq!(
            (figures.disk.writes, figures.disk.written_bytes, figures.busy_ms),
            (20, 16_384, 99)
        );
        let odd = "42 (a) b (c) S 1 1 1 0 -1 4 0 0 0 0 11 22 0 0 20 0 3 0 777 1000 50";
        assert_eq!(process(odd), Some((33, 777)));
        assert_eq!(resident_pages("5000 123 4 0 0 0 0\n"), Some(123));
        assert_eq!(run_delay_ns("10 59578 1\n"), Some(59_578));
        assert_eq!(
            group("4:memory:/x\n0::/machine.slice/a.scope\n"),
            Some("/machine.slice/a.scope")
        );
    }

    #[test]
    fn what_is_missing_or_strange_is_not_known_rather_than_nought() {
        for text in ["", "\0", "cpu", "cpu  a b", "some avg10=0.00", "some total=x", "() 1"] {
            assert_eq!(cpu_times(text, 100), None, "{text:?}");
            assert_eq!(
                (memory(text), stall(text), device(text)),
                (None, None, None),
                "{text:?}"
            );
            assert_eq!(
                (process(text), resident_pages(text).is_some() && text.is_empty()),
                (None, false),
                "{text:?}"
            );
            assert_eq!(group(text), None);
        }
        assert_eq!(memory("MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB\n"), None);
        assert_eq!(ticks_to_ms(u64::MAX, 0), u64::MAX);
    }

    #[test]
    fn this_machine_is_read() {
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        let times = cpu_times(&read("/proc/stat"), rustix::param::clock_ticks_per_second()).unwrap();
        assert!(times.idle_ms > 0 && times.busy_ms() > 0);
        let (all, available) = memory(&read("/proc/meminfo")).unwrap();
        assert!(available > 0 && available <= all);
        assert!(process(&read("/proc/self/stat")).unwrap().1 > 0);
        assert!(resident_pages(&read("/proc/self/statm")).unwrap() > 100);
    }
}

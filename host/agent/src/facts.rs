//! What this host is and offers.

use std::{convert::Infallible, fs, io, path::Path, sync::Arc, time::Duration};

use model::{BootId, HostFacts, PoolId, host::Hypervisor, host::PoolFacts};
use uuid::Uuid;

use crate::{
    room::Figures,
    shared::{NamedPool, Shared},
};

/// The token file by which hosts know that they see the same pool.
const POOL_TOKEN: &str = ".godwit-pool";
/// How long a pool may take to say how much room it has, before the last that was known is told.
const ROOM_MAX: Duration = Duration::from_secs(2);
/// Between two looks at the pools.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// So much of a pool must have been filled or freed to be told, one part of this many.
const WORTH_TELLING: u64 = 100;

/// This boot of the kernel.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn boot_id() -> io::Result<BootId> {
    // Tests of lost power give a host's agent another boot than the machine's.
    let text = match std::env::var("GODWIT_BOOT_ID") {
        Ok(text) => text,
        Err(_) => fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
    };
    Uuid::parse_str(text.trim()).map(BootId).map_err(io::Error::other)
}

/// The pool's id: what its token file says; made where there is none. Two hosts that see the same directory agree.
///
/// # Errors
/// When the token file cannot be read or made.
pub(crate) fn pool_id(root: &Path) -> io::Result<PoolId> {
    let path = root.join(POOL_TOKEN);
    fs::create_dir_all(root)?;
    let draft = root.join(format!("{POOL_TOKEN}.{}", Uuid::now_v7()));
    fs::write(&draft, Uuid::now_v7().to_string())?;
    fs::File::open(&draft)?.sync_all()?;
    // A link fails where the name exists, on network file systems too: the first host wins.
    let linked = fs::hard_link(&draft, &path);
    fs::remove_file(&draft)?;
    match linked {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let text = fs::read_to_string(&path)?;
    text.trim().parse().map_err(io::Error::other)
}

/// What this host tells when it connects. Takes at most [`ROOM_MAX`], however its pools are.
pub(crate) async fn facts(shared: &Shared, hypervisor: &Hypervisor) -> HostFacts {
    HostFacts {
        boot: shared.boot,
        address: shared.config.address,
        peer_port: shared.peer_port,
        cpus: cpus(),
        memory_mib: memory_mib().unwrap_or_else(|error| {
            tracing::warn!(%error, "this host's memory is not known; it is offered none");
            0
        }),
        hypervisor: hypervisor.clone(),
        pools: pools(shared).await,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// CPUs of this host.
pub(crate) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Tells again whenever a pool falls silent or answers again, or its room has changed by much.
pub(crate) async fn keep_telling(
    shared: &Shared,
    mut told: Vec<PoolFacts>,
    tell: impl Fn(Vec<PoolFacts>) + Send,
) -> Infallible {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = pools(shared).await;
        if is_news(&told, &now) {
            told.clone_from(&now);
            tell(now);
        }
    }
}

fn is_news(told: &[PoolFacts], now: &[PoolFacts]) -> bool {
    told.len() != now.len()
        || told.iter().zip(now).any(|(told, now)| {
            let moved = told.free_bytes.abs_diff(now.free_bytes);
            told.silent_since != now.silent_since
                || told.capacity_bytes != now.capacity_bytes
                || moved > now.capacity_bytes / WORTH_TELLING
        })
}

/// All pools as they are now, looked at at once.
pub(crate) async fn pools(shared: &Shared) -> Vec<PoolFacts> {
    let looks = shared.pools.iter().map(|(id, pool)| async move {
        let measured = Arc::clone(pool);
        let figures = pool.room.look(move || measure(&measured), ROOM_MAX).await;
        pool_facts(*id, pool, figures)
    });
    futures_util::future::join_all(looks).await
}

fn measure(pool: &NamedPool) -> Option<image::Capacity> {
    let measured = pool.pool.capacity();
    measured
        .inspect_err(|error| {
            tracing::warn!(pool = %pool.name, error = error as &dyn std::error::Error, "the pool's room is not known");
        })
        .ok()
}

fn pool_facts(id: PoolId, pool: &NamedPool, figures: Figures) -> PoolFacts {
    if let Some(since) = figures.silent_since {
        tracing::warn!(pool = %pool.name, since_ms = since.0, "the pool's file system does not answer");
    }
    let known = figures.capacity;
    PoolFacts {
        id,
        name: pool.name.clone(),
        capacity_bytes: known.map_or(0, |known| known.total_bytes),
        free_bytes: known.map_or(0, |known| known.free_bytes),
        silent_since: figures.silent_since,
    }
}

fn memory_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.map(|kib| kib / 1024)
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hosts_that_see_one_directory_agree_on_the_pools_id() {
        let dir = tempfile::tempdir().unwrap();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let root = dir.path().to_owned();
                std::thread::spawn(move || pool_id(&root).unwrap())
            })
            .collect();
        let ids: std::collections::BTreeSet<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn this_machine_has_memory_and_a_boot() {
        assert!(memory_mib().unwrap() > 16);
        boot_id().unwrap();
    }

    #[test]
    fn silence_and_much_room_are_news_and_little_room_is_not() {
        let facts = |free_bytes, silent_since| {
            vec![PoolFacts {
                id: PoolId(Uuid::nil()),
                name: "fast".parse().unwrap(),
                capacity_bytes: 1000,
                free_bytes,
                silent_since,
            }]
        };
        let since = Some(model::Timestamp(5));
        assert!(!is_news(&facts(500, None), &facts(495, None)));
        assert!(is_news(&facts(500, None), &facts(400, None)));
        assert!(is_news(&facts(500, None), &facts(500, since)));
        assert!(is_news(&facts(500, since), &facts(500, None)));
        assert!(!is_news(&facts(500, since), &facts(500, since)));
    }
}

//! What this host is and offers.

use std::{fs, io, path::Path};

use model::{BootId, HostFacts, PoolId, host::Hypervisor, host::PoolFacts};
use uuid::Uuid;

use crate::shared::Shared;

/// The token file by which hosts know that they see the same pool.
const POOL_TOKEN: &str = ".godwit-pool";

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

/// What this host tells when it connects.
pub(crate) fn facts(shared: &Shared, hypervisor: &Hypervisor) -> HostFacts {
    HostFacts {
        boot: shared.boot,
        address: shared.config.address,
        peer_port: shared.peer_port,
        cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        memory_mib: memory_mib().unwrap_or_else(|error| {
            tracing::warn!(%error, "this host's memory is not known; it is offered none");
            0
        }),
        hypervisor: hypervisor.clone(),
        pools: shared.pools.iter().map(|(id, pool)| pool_facts(*id, pool)).collect(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn pool_facts(id: PoolId, pool: &crate::shared::NamedPool) -> PoolFacts {
    let (capacity_bytes, free_bytes) = match pool.pool.capacity() {
        Ok(capacity) => (capacity.total_bytes, capacity.free_bytes),
        Err(error) => {
            tracing::warn!(pool = %pool.name, error = &error as &dyn std::error::Error, "the pool's room is not known");
            (0, 0)
        }
    };
    PoolFacts {
        id,
        name: pool.name.clone(),
        capacity_bytes,
        free_bytes,
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
}

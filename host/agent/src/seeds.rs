//! What guests are told at their first start, on its way from the order that brings it to a disk beside the VM's volumes.
//!
//! ```text
//!   order ──▶ STATE/seeds/<vm>, 0600 ──▶ volumes/<vm>.seed on the VM's pool ──▶ QEMU, read-only
//!               gone once the disk is there, the start failed, or the VM is gone
//! ```
//!
//! It may hold secrets: the task never sees it, so the journal never has it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use driver::Mode;
use image::{Pool, seed::Seed};
use model::{
    Code, Definition, Refusal, VmId,
    order::{Verb, VmOrder},
    seed::GuestSeed,
};

use crate::{
    shared::Shared,
    template::{chain, named},
};

/// Longest file that is read back, bytes: what a seed may hold, each character escaped.
const BYTES_MAX: u64 = 2 << 20;

/// Takes the seed out of an order and keeps it until its disk is made. One that cannot be kept is missed when the disk is to be made.
pub(crate) fn take(shared: &Shared, order: &mut VmOrder) {
    let Verb::Start { seed, .. } = &mut order.verb else {
        return;
    };
    let Some(seed) = seed.take() else { return };
    let saved = shared.saved_of(order.vm);
    // An order that came before is answered from the journal, and nobody would fetch this.
    if saved.is_some_and(|saved| saved.revision >= order.revision) {
        return;
    }
    if let Err(error) = keep(&shared.config.seeds_dir(), order.vm, &seed) {
        tracing::error!(vm = %order.vm, %error, "what the VM's guest is to be told was not kept");
    }
}

/// Removes what is kept for a VM, if anything is.
pub(crate) fn forget(directory: &Path, vm: VmId) {
    match fs::remove_file(kept(directory, vm)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!(%vm, %error, "what the VM's guest was told is still kept; remove it by hand");
        }
        _ => {}
    }
}

/// Removes what is kept for VMs that are not here: an agent that was killed may have left it.
pub(crate) fn sweep(directory: &Path, here: &BTreeSet<VmId>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let vm = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if vm.is_some_and(|vm: VmId| here.contains(&vm)) {
            continue;
        }
        if let Err(error) = fs::remove_file(entry.path()) {
            tracing::error!(path = %entry.path().display(), %error, "what a guest that is gone was told was not removed");
        }
    }
}

/// The open disk that tells a VM's guest who it is, where its layout has one. At a start one that is missing is made; a move's
/// destination finds that of the source.
pub(crate) fn disk(shared: &Shared, definition: &Definition, mode: Mode) -> Result<Option<OwnedFd>, Refusal> {
    if definition.layout.seed.is_none() {
        return Ok(None);
    }
    let pool = named(shared, definition.pool)?;
    open_or_make(&pool.pool, &shared.config.seeds_dir(), definition, mode).map(Some)
}

fn open_or_make(pool: &Pool, directory: &Path, definition: &Definition, mode: Mode) -> Result<OwnedFd, Refusal> {
    let vm = definition.vm;
    let failed = |what: &str, why: String| Refusal::new(Code::HostFailed, format!("VM {vm}: {what}: {why}"));
    let open = || {
        let seed = pool.open_seed(vm);
        seed.map_err(|error| failed("its seed cannot be opened", chain(&error)))
    };
    let mut seed = open()?;
    if seed.is_none() && mode == Mode::Boot {
        let told = read(directory, vm);
        let told = told.map_err(|error| failed("what its guest is to be told is not here", error.to_string()))?;
        let image = image_of(definition, told)
            .iso()
            .map_err(|error| failed("its seed cannot be made", chain(&error)))?;
        let made = pool.keep_seed(vm, &image);
        made.map_err(|error| failed("its seed was not made", chain(&error)))?;
        seed = open()?;
    }
    if mode == Mode::Boot {
        forget(directory, vm);
    }
    seed.ok_or_else(|| {
        let why = format!("pool {} does not hold it", pool.path().display());
        failed("its seed is not reachable from here", why)
    })
}

fn image_of(definition: &Definition, told: GuestSeed) -> Seed {
    Seed {
        instance_id: definition.vm.to_string(),
        hostname: told.hostname,
        ssh_keys: told.ssh_keys,
        user_data: told.user_data.map(|data| data.expose().as_bytes().to_vec()),
        ports: definition.ports.clone(),
    }
}

fn kept(directory: &Path, vm: VmId) -> PathBuf {
    directory.join(vm.to_string())
}

/// Whole or not at all, also when the agent is killed. A host that loses power starts nothing by itself, so no disk is waited for.
fn keep(directory: &Path, vm: VmId, seed: &GuestSeed) -> io::Result<()> {
    let bytes = serde_json::to_vec(seed)?;
    fs::create_dir_all(directory)?;
    let draft = directory.join(format!("{vm}.new"));
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    let written = file
        .write_all(&bytes)
        .and_then(|()| fs::rename(&draft, kept(directory, vm)));
    if written.is_err() {
        // A part of a secret must not stay.
        let _ = fs::remove_file(&draft);
    }
    written
}

fn read(directory: &Path, vm: VmId) -> io::Result<GuestSeed> {
    let mut bytes = Vec::new();
    File::open(kept(directory, vm))?
        .take(BYTES_MAX)
        .read_to_end(&mut bytes)?;
    // What the parser says may repeat a secret.
    serde_json::from_slice(&bytes).map_err(|_| io::Error::other("it is damaged; start the VM again"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::os::unix::fs::MetadataExt as _;

    use model::{
        Epoch, Generation, Mac, OperationId, PoolId, PortId, Revision,
        host::Accelerator,
        layout::{Family, Layout},
        order::PortUse,
        seed::UserData,
        template::Boot,
    };
    use task::Saved;
    use uuid::Uuid;

    use super::*;
    use crate::fixture::Cell;

    const SECRET: &str = "hunter2";

    fn told() -> GuestSeed {
        GuestSeed {
            hostname: "web1.example".to_owned(),
            ssh_keys: vec!["ssh-ed25519 AAAAC3Nz".to_owned()],
            user_data: Some(UserData::new(format!("#cloud-config\npassword: {SECRET}\n"))),
        }
    }

    fn definition() -> Definition {
        let layout = Layout {
            version: 1,
            family: Family::Q35,
            machine: "pc-q35-7.2".into(),
            accelerator: Accelerator::Tcg,
            cpu: "max".into(),
            vcpus: 1,
            memory_mib: 64,
            devices: vec![],
            seed: None,
        };
        Definition {
            template: None,
            vm: VmId(Uuid::from_u128(1)),
            name: "web1".parse().unwrap(),
            layout: layout.with_seed(),
            boot: Boot::Bios,
            pool: PoolId(Uuid::from_u128(4)),
            volumes: vec![],
            ports: vec![PortUse {
                port: PortId(Uuid::from_u128(5)),
                mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
                ip: [10, 91, 0, 7].into(),
                prefix: 24,
                gateway: None,
                mtu: 1450,
                v6: None,
                addressing: model::addressing::Addressing::default(),
                policy: model::PortPolicy::default(),
            }],
        }
    }

    fn order(revision: u64) -> VmOrder {
        VmOrder {
            epoch: Epoch(1),
            vm: definition().vm,
            generation: Generation(1),
            revision: Revision(revision),
            operation: OperationId(Uuid::from_u128(9)),
            verb: Verb::Start {
                definition: Box::new(definition()),
                paused: false,
                seed: Some(Box::new(told())),
            },
        }
    }

    fn holds(mut seed: File, text: &str) -> bool {
        let mut bytes = Vec::new();
        seed.read_to_end(&mut bytes).unwrap();
        bytes.windows(text.len()).any(|part| part == text.as_bytes())
    }

    #[tokio::test]
    async fn an_order_is_fed_without_its_seed_which_is_kept_for_new_orders_alone() {
        let shared = Cell::new().host(1).await;
        let (directory, vm) = (shared.config.seeds_dir(), definition().vm);
        let mut new = order(2);
        take(&shared, &mut new);
        assert!(matches!(new.verb, Verb::Start { seed: None, .. }));
        assert_eq!(read(&directory, vm).unwrap(), told());
        let mode = fs::metadata(kept(&directory, vm)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        forget(&directory, vm);
        let saved = Saved {
            revision: Revision(2),
            ..Saved::new(vm, shared.boot)
        };
        shared.save(&saved).unwrap();
        let mut again = order(2);
        take(&shared, &mut again);
        assert!(matches!(again.verb, Verb::Start { seed: None, .. }));
        assert!(!kept(&directory, vm).exists());
    }

    #[test]
    fn a_seed_is_made_at_a_start_found_by_a_move_and_made_again_when_it_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let (directory, vm) = (root.path().join("seeds"), definition().vm);
        let pool = Pool::open(&root.path().join("pool")).unwrap();
        let open = |mode| open_or_make(&pool, &directory, &definition(), mode).map(File::from);
        let refused = open(Mode::Wait).unwrap_err();
        assert!(refused.message.contains("not reachable"), "{}", refused.message);
        assert!(open(Mode::Boot).unwrap_err().message.contains("not here"));
        for _ in 0..2 {
            keep(&directory, vm, &told()).unwrap();
            let made = open(Mode::Boot).unwrap();
            assert!(holds(made, "web1.example") && !kept(&directory, vm).exists());
            let found = open(Mode::Wait).unwrap();
            assert!(holds(found, SECRET));
            assert!(pool.delete_seed(vm).unwrap());
        }
    }

    #[test]
    fn what_is_kept_for_a_vm_that_is_gone_is_swept_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("seeds");
        let (here, gone) = (VmId(Uuid::from_u128(1)), VmId(Uuid::from_u128(2)));
        keep(&directory, here, &told()).unwrap();
        keep(&directory, gone, &told()).unwrap();
        fs::write(directory.join(format!("{here}.new")), SECRET).unwrap();
        sweep(&directory, &BTreeSet::from([here]));
        assert!(!kept(&directory, gone).exists() && !directory.join(format!("{here}.new")).exists());
        assert_eq!(read(&directory, here).unwrap(), told());
        // What is damaged is refused without being told.
        fs::write(kept(&directory, here), format!("{{\"hostname\":{SECRET}")).unwrap();
        assert!(!read(&directory, here).unwrap_err().to_string().contains(SECRET));
    }
}

//! For tests: what the tasks of an agent share, of hosts of one cell, without a controller. It needs root and an installed QEMU, as an
//! agent does.
#![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

use std::{path::Path, sync::Arc, time::SystemTime};

use identity::{ClusterAuthority, Fingerprint, NodeIdentity, NodeKey, Role};
use model::{HostId, PoolId};
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    AgentConfig, Membership, facts, journal,
    shared::{NamedPool, Parts, Shared},
    tunnel,
};

/// A cell's authority, and its hosts' directories.
pub(crate) struct Cell {
    dir: TempDir,
    authority: ClusterAuthority,
}

/// Its `n`th host.
pub(crate) fn host_id(n: u128) -> HostId {
    HostId(Uuid::from_u128(0x100 + n))
}

/// Its pool.
pub(crate) fn pool_id(n: u128) -> PoolId {
    PoolId(Uuid::from_u128(0x500 + n))
}

/// The configuration of an agent in `dir`.
pub(crate) fn config(dir: &Path) -> AgentConfig {
    AgentConfig {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        address: [127, 0, 0, 1].into(),
        pools: vec![],
        bridge: "none0".parse().unwrap(),
        uplink: None,
        gateway: None,
        mtu: 1500,
        qemu: "qemu-system-x86_64".into(),
        exe: "/proc/self/exe".into(),
    }
}

impl Cell {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = ClusterAuthority::create(&dir.path().join("authority"), Uuid::from_u128(1), SystemTime::now());
        Self {
            authority: made.unwrap(),
            dir,
        }
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        self.authority.certificate().fingerprint()
    }

    pub(crate) fn identity(&self, n: u128) -> NodeIdentity {
        let key = NodeKey::generate().unwrap();
        let request = key.request().unwrap();
        let issued = self
            .authority
            .issue(&request, Role::Host(host_id(n).0), SystemTime::now())
            .unwrap()
            .to_vec();
        NodeIdentity::new(key, issued, self.authority.certificate().clone()).unwrap()
    }

    /// What the agent of the `n`th host shares.
    pub(crate) async fn host(&self, n: u128) -> Arc<Shared> {
        let dir = self.dir.path().join(n.to_string());
        let config = config(&dir);
        std::fs::create_dir_all(&config.run_dir).unwrap();
        config.make_state_dir().unwrap();
        let boot = facts::boot_id().unwrap();
        let program = qemu::Program::locate(Some(&config.qemu));
        let capabilities = qemu::discover(&program).await.unwrap();
        let pool = NamedPool {
            name: "local".parse().unwrap(),
            pool: image::Pool::open(&dir.join("pool")).unwrap(),
            room: Arc::default(),
        };
        let shared = Shared::new(Parts {
            membership: Membership {
                version: 1,
                host: host_id(n),
                name: None,
                cluster: Uuid::from_u128(1),
                controller: "127.0.0.1:1".to_owned(),
            },
            boot,
            peer_port: 1,
            network: network::Network::open().unwrap(),
            desks: crate::desks::Common::new().unwrap(),
            policies: crate::policies::Policies::open(config.state_dir.join("ports")).unwrap(),
            pools: [(pool_id(n), Arc::new(pool))].into(),
            identity: self.identity(n),
            journal: journal::Journal::open(&config.journal_path(), boot).unwrap(),
            tunnels: tunnel::Program::open(&config.exe).unwrap(),
            config,
        });
        shared.has_hypervisor(qemu::Qemu::new(program, capabilities));
        shared
    }
}

//! What an agent is configured with, and what it keeps in its state directory.

use std::{net::IpAddr, path::PathBuf};

use identity::{NodeIdentity, secret_file};
use model::{HostId, Name};
use network::{Gateway, InterfaceName};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What an agent is configured with. Paths are made where they are missing.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// What survives a reboot: identity, journal, logs. 0700.
    pub state_dir: PathBuf,
    /// What does not: sockets. 0711, since each VM's own directory in it belongs to the VM's own user.
    pub run_dir: PathBuf,
    /// Where other hosts reach this one for migrations.
    pub address: IpAddr,
    /// Its storage pools: a name and a directory each.
    pub pools: Vec<(Name, PathBuf)>,
    /// The bridge of VMs.
    pub bridge: InterfaceName,
    /// The interface by which the bridge reaches other hosts.
    pub uplink: Option<InterfaceName>,
    /// An address of the host itself on the bridge.
    pub gateway: Option<Gateway>,
    /// Largest packet on the bridge, bytes.
    pub mtu: u32,
    /// QEMU.
    pub qemu: PathBuf,
    /// This program, which also is the tunnel's: opened when the agent starts, so that an upgrade may replace its file. Of a process that
    /// is to be its own tunnels' program, `/proc/self/exe`.
    pub exe: PathBuf,
}

/// What joining left in the state directory, beside the identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Form of this record; 1 now.
    pub version: u16,
    /// This host.
    pub host: HostId,
    /// What the cell calls it; `None` where a controller did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The cluster.
    pub cluster: Uuid,
    /// `HOST:PORT` of the controller's port for agents.
    pub controller: String,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// This host has joined no cell.
    #[error(
        "this host has not joined a cell; get a token with `godwit host add-token` and start with --join TOKEN@ADDRESS"
    )]
    NotJoined,
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: identity::secret_file::ReadSecretError,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: identity::secret_file::WriteSecretError,
    },
    /// A file is damaged.
    #[error("{} is damaged; restore it, or remove it and join again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The identity is of no use.
    #[error("this host's identity cannot be used")]
    Identity(#[from] identity::NodeError),
}

impl AgentConfig {
    /// Where this host's key and certificate are.
    #[must_use]
    pub fn identity_path(&self) -> PathBuf {
        self.state_dir.join("identity.pem")
    }

    /// Where the agent's journal is.
    #[must_use]
    pub fn journal_path(&self) -> PathBuf {
        self.state_dir.join("journal")
    }

    pub(crate) fn membership_path(&self) -> PathBuf {
        self.state_dir.join("membership.json")
    }

    /// Whether this host has joined a cell.
    #[must_use]
    pub fn has_joined(&self) -> bool {
        self.membership_path().exists()
    }

    /// Keeps what joining gave.
    ///
    /// # Errors
    /// [`StateError`]; then joining can be tried again with the same token.
    pub fn keep(&self, membership: &Membership, identity: &NodeIdentity) -> Result<(), StateError> {
        self.make_state_dir()?;
        identity.save(&self.identity_path())?;
        let path = self.membership_path();
        let text = serde_json::to_vec_pretty(membership).map_err(|source| StateError::Damaged {
            path: path.clone(),
            source,
        })?;
        secret_file::replace(&path, &text).map_err(|source| StateError::Write { path, source })
    }

    /// Reads what joining gave.
    ///
    /// # Errors
    /// [`StateError::NotJoined`] where there is nothing.
    pub fn membership(&self) -> Result<(Membership, NodeIdentity), StateError> {
        if !self.has_joined() {
            return Err(StateError::NotJoined);
        }
        let path = self.membership_path();
        let bytes = secret_file::read(&path, 64 << 10).map_err(|source| StateError::Read {
            path: path.clone(),
            source,
        })?;
        let membership = serde_json::from_slice(&bytes).map_err(|source| StateError::Damaged { path, source })?;
        Ok((membership, NodeIdentity::load(&self.identity_path())?))
    }

    /// Makes the state directory, 0700.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub fn make_state_dir(&self) -> Result<(), StateError> {
        secret_file::private_directory(&self.state_dir).map_err(|source| StateError::Write {
            path: self.state_dir.clone(),
            source,
        })
    }

    /// A VM's own directory of sockets.
    #[must_use]
    pub fn vm_run_dir(&self, vm: model::VmId) -> PathBuf {
        self.run_dir.join(vm.to_string())
    }

    /// Where what guests are to be told waits for its disk.
    #[must_use]
    pub(crate) fn seeds_dir(&self) -> PathBuf {
        self.state_dir.join("seeds")
    }

    /// Where the VMs' directories of logs are.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        self.state_dir.join("logs")
    }

    /// A VM's own directory of logs.
    #[must_use]
    pub fn vm_log_dir(&self, vm: model::VmId) -> PathBuf {
        self.logs_dir().join(vm.to_string())
    }
}

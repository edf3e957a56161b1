//! Typed ids and numbers: one newtype a kind, so that a host is never passed where a VM is meant.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(text).map(Self)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    )+};
}

ids! {
    /// A host, as its certificate names it. Survives renames and changes of address.
    HostId,
    /// One boot of a host's kernel (`/proc/sys/kernel/random/boot_id`): a host that lost power runs nothing of an older boot.
    BootId,
    /// A virtual machine.
    VmId,
    /// A tenant's project.
    ProjectId,
    /// A storage pool; written in the pool's own token file, so hosts that see the same files report the same id.
    PoolId,
    /// A virtual disk.
    VolumeId,
    /// A virtual network.
    NetworkId,
    /// An address range of a network.
    SubnetId,
    /// A VM's attachment to a network.
    PortId,
    /// A template from which VMs are made.
    TemplateId,
    /// A slow piece of work with progress and an end.
    OperationId,
    /// One request of a client, within one controller process.
    RequestId,
    /// A join token or an API token.
    TokenId,
    /// A person.
    UserId,
    /// An entry of the audit log. Begins with its time: the order of ids is the order of entries.
    AuditId,
    /// Rules that ports share.
    SecurityGroupId,
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number that follows.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )+};
}

numbers! {
    /// Which host may run a VM: the holder of the highest generation that was granted. Only grows, per VM.
    Generation,
    /// Which order about a VM is the newest. Only grows, per VM; an agent answers an old one from its journal.
    Revision,
    /// Which leader wrote: a deposed leader's epoch is refused by the store and by agents.
    Epoch,
    /// Position in the cell's stream of notices.
    Sequence,
}

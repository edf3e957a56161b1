//! Whether this kernel has the kinds of interface that VMs' networks are made of, found out by making one of each in a
//! network namespace that goes away with its thread.

use std::{fs::OpenOptions, io, thread};

use rustix::io::Errno;

use crate::{
    link::{self, Trial},
    netlink::{Netlink, NetlinkError},
    sys,
};

const TUN_DEVICE: &str = "/dev/net/tun";

/// A kind of interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A virtual switch.
    Bridge,
    /// A cable between two namespaces.
    Veth,
    /// A VM's port.
    Tap,
    /// A tunnel of Ethernet over UDP (RFC 7348).
    Vxlan,
}

impl LinkKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Bridge, Self::Veth, Self::Tap, Self::Vxlan];

    /// The kernel module that has it.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Veth => "veth",
            Self::Tap => "tun",
            Self::Vxlan => "vxlan",
        }
    }
}

/// Why no trial could be held.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// No namespace, for want of privileges or of kernel support.
    #[error("cannot make a network namespace to try in")]
    Namespace(#[source] io::Error),
    /// No thread.
    #[error("cannot start a thread to try in")]
    Thread(#[source] io::Error),
    /// The work panicked.
    #[error("the trial did not come to its end")]
    Lost,
}

/// Why an interface could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkTrialError {
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The device of taps refused.
    #[error("{TUN_DEVICE} cannot be used")]
    Tun(#[source] io::Error),
}

/// A network namespace of its own, in which it is safe to try. Only [`in_throwaway_namespace`] makes one.
#[derive(Debug)]
pub struct Throwaway(());

impl Throwaway {
    /// Makes an interface of this kind. It is gone with the namespace at the latest.
    ///
    /// # Errors
    /// What the kernel or the device of taps said.
    pub fn try_link(&self, kind: LinkKind) -> Result<(), LinkTrialError> {
        let mut netlink = Netlink::open()?;
        let request = match kind {
            LinkKind::Bridge => Trial::Bridge,
            LinkKind::Veth => Trial::Veth,
            LinkKind::Vxlan => Trial::Vxlan,
            LinkKind::Tap => return try_tap(),
        };
        netlink.execute(&[link::trial(request)])?;
        Ok(())
    }
}

fn try_tap() -> Result<(), LinkTrialError> {
    let tun = OpenOptions::new().read(true).write(true).open(TUN_DEVICE);
    let made = tun.and_then(|tun| sys::make_tap(&tun, "godwit-try").map_err(|errno: Errno| errno.into()));
    made.map_err(LinkTrialError::Tun)
}

/// Does `work` on a new thread, in a new network namespace; programs that it starts are in it, too. The namespace goes with
/// the thread, and everything in it. Making an interface may have the kernel load the module of its kind.
///
/// # Errors
/// [`TrialError`]; without root or CAP_SYS_ADMIN, `Namespace`.
pub fn in_throwaway_namespace<T: Send + 'static>(
    work: impl FnOnce(&Throwaway) -> T + Send + 'static,
) -> Result<T, TrialError> {
    let thread = thread::Builder::new().name("trial".to_owned()).spawn(move || {
        sys::new_network_namespace()
            .map(|()| work(&Throwaway(())))
            .map_err(|errno| TrialError::Namespace(errno.into()))
    });
    let outcome = thread.map_err(TrialError::Thread)?.join();
    outcome.unwrap_or(Err(TrialError::Lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_is_made_in_the_throwaway_and_nowhere_else() {
        let names = || -> Vec<String> {
            let mut names: Vec<_> = crate::link::all(&mut Netlink::open().unwrap())
                .unwrap()
                .into_iter()
                .map(|link| link.name)
                .filter(|name| name.starts_with("godwit-try"))
                .collect();
            names.sort();
            names
        };
        let made = in_throwaway_namespace(move |throwaway| {
            for kind in LinkKind::ALL {
                throwaway.try_link(kind).unwrap();
            }
            // A second one of the same name is refused: the first is really there.
            let again = throwaway.try_link(LinkKind::Bridge);
            assert!(matches!(again, Err(LinkTrialError::Netlink(_))), "{again:?}");
            names()
        });
        // The tap went with its descriptor.
        assert_eq!(
            made.unwrap(),
            ["godwit-try-br", "godwit-try-v0", "godwit-try-v1", "godwit-try-vx"]
        );
        assert!(names().is_empty(), "nothing of it is in this namespace");
    }
}

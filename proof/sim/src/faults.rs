//! What breaks, and how it is mended.

use crate::{Checked, Happens, Sim};

impl Sim {
    pub(crate) fn count(&mut self, fault: &'static str) {
        *self.outcome.faults.entry(fault).or_default() += 1;
    }

    /// Whether two hosts do not reach each other.
    pub(crate) fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cuts.contains(&(a.min(b), a.max(b)))
    }

    pub(crate) fn breaks(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        self.after(300, 8_000, Happens::Breaks);
        let host = self.chance.index(self.hosts.len());
        match self.chance.below(12) {
            0..=2 if self.hosts[host].agent.is_some() => {
                self.count("agent killed");
                self.agent_dies(host)
            }
            3 => {
                self.count("host lost power");
                self.power_off(host)
            }
            4 | 5 => {
                let at = self.chance.index(self.processes.len());
                let Some(&id) = self.processes.keys().nth(at) else {
                    return Ok(());
                };
                self.count("hypervisor killed");
                self.ends(id, "killed from outside")
            }
            6 | 7 => {
                let other = (host + 1) % self.hosts.len();
                self.count("hosts cut apart");
                self.cuts.insert((host.min(other), host.max(other)));
                self.links_changed();
                self.after(
                    500,
                    20_000,
                    Happens::Heals {
                        a: host,
                        b: Some(other),
                    },
                );
                Ok(())
            }
            8 | 9 => {
                self.count("host cut from the controller");
                self.hosts[host].reachable = false;
                self.after(500, 20_000, Happens::Heals { a: host, b: None });
                self.session_ends(host)
            }
            10 if self.world.is_some() => {
                self.count("controller killed");
                self.controller_dies()
            }
            // A connection that breaks and is made again: what was in flight is lost.
            _ => {
                self.count("session broken");
                self.session_ends(host)
            }
        }
    }

    pub(crate) fn heals(&mut self, a: usize, b: Option<usize>) -> Checked {
        match b {
            Some(b) => drop(self.cuts.remove(&(a.min(b), a.max(b)))),
            None => self.hosts[a].reachable = true,
        }
        self.links_changed();
        Ok(())
    }

    /// All is mended.
    pub(crate) fn heal(&mut self) -> Checked {
        self.cuts.clear();
        self.links_changed();
        self.controller_starts()?;
        for host in 0..self.hosts.len() {
            self.hosts[host].reachable = true;
            self.power_on(host)?;
        }
        Ok(())
    }
}

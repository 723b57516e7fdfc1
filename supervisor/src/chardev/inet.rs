//! Host names of sockets. The C library's resolver would load plug-ins and talk to servers, so that only what needs
//! neither is known: numbers, `localhost`, and the names in /etc/hosts.

use crate::config::{Families, Inet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const HOSTS: &str = "/etc/hosts";

/// Why a host has no address here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// It is not known.
    #[error("only numbers, localhost and the names in {HOSTS} are")]
    Name,
    /// It is known, but not in this family.
    #[error("it has no address of the wanted family")]
    Family,
    /// `numeric=on`.
    #[error("it is no number")]
    NotNumeric,
}

/// The addresses of a host. An empty name is, for a server, every address of this one.
///
/// # Errors
/// [`Unknown`].
pub fn resolve(inet: &Inet, is_server: bool) -> Result<Vec<SocketAddr>, Unknown> {
    let found: Vec<IpAddr> = match &*inet.host {
        "" if is_server => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        host => match host.parse() {
            Ok(address) => vec![address],
            Err(_) if inet.numeric => return Err(Unknown::NotNumeric),
            Err(_) if host == "localhost" => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            Err(_) => in_hosts(&std::fs::read_to_string(HOSTS).unwrap_or_default(), host),
        },
    };
    if found.is_empty() {
        return Err(Unknown::Name);
    }
    let wanted = |address: &IpAddr| match inet.families {
        Families::Any => true,
        Families::V4 => address.is_ipv4(),
        Families::V6 => address.is_ipv6(),
    };
    let addresses: Vec<_> = found
        .into_iter()
        .filter(wanted)
        .map(|address| SocketAddr::new(address, inet.port))
        .collect();
    if addresses.is_empty() {
        return Err(Unknown::Family);
    }
    Ok(addresses)
}

/// The addresses that a hosts file gives a name.
fn in_hosts(file: &str, host: &str) -> Vec<IpAddr> {
    let line = |line: &str| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(address)
    };
    file.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_localhost_and_the_hosts_file_are_known() {
        let resolve = |host: &str| resolve(&Inet::new(host, 7), false);
        assert_eq!(resolve("::1").unwrap(), ["[::1]:7".parse().unwrap()]);
        assert_eq!(resolve("localhost").unwrap()[0], "127.0.0.1:7".parse().unwrap());
        let file = "# 10.0.0.9 web\n10.0.0.1\tWeb web.example # db\nbroken web\n";
        assert_eq!(in_hosts(file, "web"), [IpAddr::from([10, 0, 0, 1])]);
        assert!(in_hosts(file, "db").is_empty());
        assert_eq!(resolve("nosuch.invalid"), Err(Unknown::Name));
        assert_eq!(resolve(""), Err(Unknown::Name));
    }

    #[test]
    fn a_family_and_a_number_can_be_asked_for() {
        let with = |host: &str, families, numeric| {
            let inet = Inet {
                families,
                numeric,
                ..Inet::new(host, 7)
            };
            super::resolve(&inet, true)
        };
        assert_eq!(
            with("localhost", Families::V6, false).unwrap(),
            ["[::1]:7".parse().unwrap()]
        );
        assert_eq!(with("", Families::V4, true).unwrap(), ["0.0.0.0:7".parse().unwrap()]);
        assert_eq!(with("127.0.0.1", Families::V6, false), Err(Unknown::Family));
        assert_eq!(with("localhost", Families::Any, true), Err(Unknown::NotNumeric));
        assert_eq!(with("::1", Families::Any, true).unwrap(), ["[::1]:7".parse().unwrap()]);
    }
}

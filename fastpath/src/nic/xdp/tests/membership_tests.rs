//! What the interface itself receives for: the guest's MAC before and after the guest may hear anything (rule 24).

use std::process::Command;

use super::*;

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether an address is among those that `a1` receives for.
fn receives_for(mac: Mac) -> bool {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let filter = said("bridge", &["fdb", "show", "dev", "a1"]);
    filter.lines().any(|line| line.starts_with(&mac))
}

/// How many want all that `a1` meets, and how many all that is said to groups.
fn wanted() -> [u32; 2] {
    let shown = said("ip", &["-d", "link", "show", "a1"]);
    let words: Vec<&str> = shown.split_whitespace().collect();
    ["promiscuity", "allmulti"].map(|name| {
        let pair = words.windows(2).find(|pair| pair[0] == name);
        pair.unwrap()[1].parse().unwrap()
    })
}

/// A NIC on `a1`.
fn far(filter: Filter) -> End {
    End::new(XdpNicConfig {
        filter,
        ..config("a1", FAR)
    })
}

/// Waits until `a1` is as it was. A process that another test starts holds the socket until it runs its program.
fn until_gone(macs: &[Mac]) {
    let begun = Instant::now();
    while wanted() != [0, 0] || macs.iter().any(|mac| receives_for(*mac)) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", wanted());
    }
}

#[test]
fn rule_24_the_nic_receives_for_the_guest_while_it_is_its_nic() {
    with_veth(1, 1500, || {
        until_gone(&[FAR]);
        // Before the promotion, too: nothing has to be told to the interface then.
        for filter in [Filter::DropAll, Filter::Guest(FAR)] {
            let end = far(filter);
            assert!(receives_for(FAR), "{filter:?}");
            assert_eq!(wanted()[1], 1, "{filter:?}");
            end.end();
            until_gone(&[FAR]);
        }
    });
}

#[test]
fn rule_24_a_guest_that_moves_in_is_received_for_as_well() {
    with_veth(1, 1500, || {
        let mut end = far(Filter::DropAll);
        end.nic.set_filter(Filter::Guest(NEAR)).unwrap();
        assert!(receives_for(NEAR) && receives_for(FAR));
        end.end();
        until_gone(&[NEAR, FAR]);
    });
}

#[test]
fn rule_24_an_open_nic_receives_everything() {
    with_veth(1, 1500, || {
        let end = far(Filter::Open);
        assert_eq!((receives_for(FAR), wanted()), (false, [1, 0]));
        end.end();
        until_gone(&[FAR]);
        // Or is opened later: the address, all groups, and everything.
        let mut end = far(Filter::DropAll);
        let before = wanted();
        end.nic.set_filter(Filter::Open).unwrap();
        assert_eq!(wanted(), [before[0] + 1, before[1]]);
        end.end();
        until_gone(&[FAR]);
    });
}

PS1='kvasir:\w\$ '
# There is nothing to stop before the machine goes.
alias poweroff='poweroff -f' halt='halt -f' reboot='reboot -f'
